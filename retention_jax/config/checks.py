"""How a configuration says everything that is wrong with it at once."""


def require(owner: object, *checks: tuple[bool, str]) -> None:
    """Raises ValueError with the text of every check that does not hold."""
    problems = [text for ok, text in checks if not ok]
    if problems:
        raise ValueError(f"{type(owner).__name__}: " + "; ".join(problems))
