"""Statements about attention dilution, reconstructed and proved by ourselves.

We know the propositions of arXiv 2605.09649 by one-line descriptions only. 3.1: distractors that nearly tie with useful
tokens force dilution. 3.2: keeping useful tokens by preference lowers it. `least_dilution`, `needed_margin` and
`dilution_after` are statements of that kind, not quotations. So are `expected_use` and `age_of_equal_use`. They are
about the paper's geometric retention, which chooses the tokens to keep.
"""

import numpy as np
from jaxtyping import Float


def least_dilution(
    useful: Float[np.ndarray, "..."], distractors: Float[np.ndarray, "..."], gap: Float[np.ndarray, "..."]
) -> Float[np.ndarray, "..."]:
    """Dilution is at least m e^-gap / (u + m e^-gap) where no distractor's logit is more than `gap` below the best one.

    Reconstructed by us. Proof: with z the largest useful logit, u useful tokens weigh at most u e^z, and m distractors
    at least m e^(z - gap). So dilution tends to 1 as m grows while u and the gap stay; it is an equality where all
    useful logits are equal and all distractors lie exactly `gap` below.
    """
    weight = distractors * np.exp(-gap)
    return weight / (useful + weight)


def needed_margin(
    useful: Float[np.ndarray, "..."], distractors: Float[np.ndarray, "..."], dilution: Float[np.ndarray, "..."]
) -> Float[np.ndarray, "..."]:
    """The margin at which u useful tokens and m distractors have this dilution d: log(m (1 - d) / (u d)).

    Reconstructed by us. The margin is the log of mean_U e^z / mean_D e^z, z the logits; where useful logits are all
    equal, and distractors' too, it is their difference. Since d = m / (m + u e^margin), a dilution of at most d needs
    at least this margin: it must grow like log m.
    """
    return np.log(distractors * (1 - dilution) / (useful * dilution))


def dilution_after(
    dilution: Float[np.ndarray, "..."],
    kept_useful: Float[np.ndarray, "..."],
    kept_distractors: Float[np.ndarray, "..."],
) -> Float[np.ndarray, "..."]:
    """Dilution once only these shares of the useful and of the other attention mass are kept: r d / (r d + s (1 - d)).

    Reconstructed by us; s = `kept_useful`, r = `kept_distractors`, one of them above 0. Softmax over what is kept is
    the old one rescaled. For 0 < d < 1 dilution falls exactly where s > r, where the useful are kept by preference.
    """
    rest = kept_distractors * dilution
    return rest / (rest + kept_useful * (1 - dilution))


def expected_use(
    beta: Float[np.ndarray, "..."], age: Float[np.ndarray, "..."], horizon: Float[np.ndarray, "..."]
) -> Float[np.ndarray, "..."]:
    """Of the next n steps, those in which a token is still of use: beta^(age + 1) (1 - beta^n) / (1 - beta).

    Reconstructed by us. Let a token's use end at each step with probability 1 - beta, whatever was before. Then it
    lasts to age a with probability beta^a, and no other law is memoryless: P(a + b) = P(a) P(b) for whole a, b gives
    P(a) = P(1)^a. The expected number is sum_{s=1..n} beta^(age + s), for 0 < beta < 1 and an age in steps. Its log is
    `policies.retention` with a horizon n above 1; with horizon 1 that is the log of beta^age, of one step before.
    """
    return beta ** (age + 1) * (1 - beta**horizon) / (1 - beta)


def age_of_equal_use(
    beta: Float[np.ndarray, "..."], fresh_beta: Float[np.ndarray, "..."], horizon: Float[np.ndarray, "..."]
) -> Float[np.ndarray, "..."]:
    """The age up to which a token is of more use in the next n steps than a fresh one, of age 0, whose beta is lower.

    Reconstructed by us, by solving `expected_use` for the age: log(b g(b) / (beta g(beta))) / log beta, where b is the
    fresh token's and g(x) = (1 - x^n) / (1 - x) is what looking n steps ahead multiplies the use by. At n = 1 g is 1,
    and the order that of beta^(age + 1). g lies between 1 and n, and as n grows it grows faster the nearer x
    is to 1: so the age grows too, and a token evicted first at n = 1 may be kept at a larger n. As n grows without
    bound, g tends to 1 / (1 - x), and the age to a limit.
    """
    gain = lambda x: (1 - x**horizon) / (1 - x)
    return np.log(fresh_beta * gain(fresh_beta) / (beta * gain(beta))) / np.log(beta)
