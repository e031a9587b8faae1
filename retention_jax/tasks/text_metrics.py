"""Scores of an answer beside its references, 0 to 1, each as the benchmark that publishes results with it defines it.

The definitions are kept with their oddities, since a score is comparable only with scores of the same definition:

    LongBench       github.com/THUDM/LongBench, metrics.py (F1, classification, retrieval, count, edit similarity);
                    its ROUGE-L is that of the package `rouge` 1.0.1
    InfiniteBench   github.com/OpenBMB/InfiniteBench, src/compute_scores.py, and SCBench after it
                    (github.com/microsoft/MInference, scbench/compute_scores.py); its ROUGE-Lsum is `rouge_score` 0.1.2
"""

import difflib
import re
import string
from collections import Counter
from collections.abc import Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_CHINESE_PUNCTUATION = str.maketrans(
    "",
    "",
    string.punctuation
    + "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】"
    + "〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏.",
)


def truncated_middle(tokens: Sequence[int], limit: int) -> list[int]:
    """Tokens without their middle, so that at most `limit` are left: the first and the last half of the limit.

    As LongBench and SCBench shorten prompts that are too long; of an odd limit one token stays unused.

    Raises:
      ValueError: when the limit is below 2, which leaves nothing to keep.
    """
    if limit < 2:
        raise ValueError(f"a prompt cannot be cut to {limit} tokens: at least 2 are needed")
    if len(tokens) <= limit:
        return list(tokens)
    return [*tokens[: limit // 2], *tokens[-(limit // 2) :]]


# Words


def normalised(text: str) -> str:
    """Lower case without punctuation, English articles and superfluous space, as SQuAD compares answers."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def qa_f1(answer: str, gold: str) -> float:
    """F1 of the words that two texts share, after normalisation (LongBench, SQuAD)."""
    return _f1(normalised(answer).split(), normalised(gold).split())


def chinese_qa_f1(answer: str, gold: str) -> float:
    """F1 of the characters that two texts share, without punctuation and space (InfiniteBench).

    LongBench counts words that jieba finds instead.
    """
    characters = lambda text: "".join(text.lower().translate(_CHINESE_PUNCTUATION).split())
    return _f1(characters(answer), characters(gold))


def _f1(answer: Sequence[str], gold: Sequence[str]) -> float:
    same = sum((Counter(answer) & Counter(gold)).values())
    return 2 * same / (len(answer) + len(gold)) if same else 0.0


# Longest common subsequences


def rouge_l(answer: str, gold: str) -> float:
    """ROUGE-L F of the package `rouge`, as LongBench calls it: sentences end at full stops, words count once.

    For every pair of sentences the words of their longest common subsequence are hits; hits, like the words of both
    texts, are sets. The package's recursion fails for sentences of many hundred words, where LongBench's score is 0;
    here they are scored.
    """
    answer_sentences, gold_sentences = _dotted(answer), _dotted(gold)
    hits = set()
    for gold_words in gold_sentences:
        for answer_words in answer_sentences:
            hits |= {gold_words[i] for i, _ in _common(gold_words, answer_words)}
    if not hits:
        return 0.0
    precision, recall = (len(hits) / len(set().union(*text)) for text in (answer_sentences, gold_sentences))
    return 2 * precision * recall / (precision + recall + 1e-8)


def _dotted(text: str) -> list[list[str]]:
    # A sentence of nothing but space is one empty word in the package, and counted.
    return [" ".join(sentence.split()).split(" ") for sentence in text.split(".") if sentence]


def rouge_l_sum(answer: str, gold: str) -> float:
    """ROUGE-Lsum F of the package `rouge_score` without stemming: sentences end at line ends, words count as often as
    both texts have them (InfiniteBench, SCBench)."""
    answer_sentences, gold_sentences = _lines(answer), _lines(gold)
    left = Counter(word for words in answer_sentences for word in words)
    hits = 0
    for gold_words in gold_sentences:
        found = {i for words in answer_sentences for _, i in _common(words, gold_words)}
        for word in (gold_words[i] for i in sorted(found)):
            if left[word]:
                hits += 1
                left[word] -= 1
    return 2 * hits / sum(map(len, answer_sentences + gold_sentences)) if hits else 0.0


def _lines(text: str) -> list[list[str]]:
    return [re.sub(r"[^a-z0-9]+", " ", line.lower()).split() for line in text.split("\n")]


def _common(first: Sequence[str], second: Sequence[str]) -> list[tuple[int, int]]:
    """Index pairs of one longest common subsequence, last pair first; of equally long ones the one that uses the
    latest words of `first`. Which one it is decides what several sentences cover together."""
    longest = [[0] * (len(second) + 1)]
    for word in first:
        above, row = longest[-1], [0]
        for j, other in enumerate(second):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
        longest.append(row)
    pairs = []
    i, j = len(first), len(second)
    while i and j:
        if first[i - 1] == second[j - 1]:
            i, j = i - 1, j - 1
            pairs.append((i, j))
        elif longest[i - 1][j] > longest[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return pairs


# Choices, numbers, code


def classification(answer: str, gold: str, classes: Sequence[str]) -> float:
    """One over the number of class names that occur in the answer, if the right one does (LongBench).

    A name that is a part of the right one does not count, unless it stands right behind another such name: LongBench
    removes them from the list that it walks along, which skips one.
    """
    named = [name for name in classes if name in answer]
    for name in named:
        if name in gold and name != gold:
            named.remove(name)
    return 1 / len(named) if gold in named else 0.0


def number_share(answer: str, gold: str) -> float:
    """The share of numbers in the answer that are the right one (LongBench's count and retrieval scores)."""
    numbers = re.findall(r"\d+", answer)
    return numbers.count(gold) / len(numbers) if numbers else 0.0


def edit_similarity(answer: str, gold: str) -> float:
    """How alike the first line of code in the answer and the next line are (LongBench).

    A line of code is one without backtick, hash and double slash. The ratio is difflib's in whole percent: that of
    fuzzywuzzy where python-Levenshtein is not installed, as in LongBench's requirements.
    """
    lines = answer.lstrip("\n").split("\n")
    code = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return round(100 * difflib.SequenceMatcher(None, code, gold).ratio()) / 100


def first_number(answer: str) -> float | None:
    """The first number without sign in a text, such as 3 or 3.5 (InfiniteBench's Math.Find)."""
    match = re.search(r"\d+\.\d+|\d+", answer)
    return float(match[0]) if match else None


def share_contained(answer: str, golds: Sequence[str]) -> float:
    """The share of the references that occur in the answer, whatever the case, in hundredths (RULER, SCBench)."""
    return round(sum(gold.lower() in answer.lower() for gold in golds) / len(golds), 2)
