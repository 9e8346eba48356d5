"""Document frequencies of words, counted over texts."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from lightning_plugins._arguments import check_arguments
from lightning_plugins._checks import check_positive_int
from lightning_plugins.functional.document_frequency import Variant, inverse_document_frequency


class DocumentFrequencies:
    """Number of documents that contain each word.

    Words are numbered alphabetically, independently of the order of the texts.

    Args:
        counts: Number of documents by word.
        num_documents: Number of documents.

    Raises:
        ValueError: If there is no document, or a count exceeds their number.
        TypeError: If ``num_documents`` is not an int.

    Example:
        >>> table = DocumentFrequencies.from_texts(["the cat", "the dog", "The end"], str.split)
        >>> table.words
        ['The', 'cat', 'dog', 'end', 'the']
        >>> table.idf(["the", "cat"]).tolist() == table.idf()[[4, 1]].tolist()
        True
    """

    def __init__(self, counts: dict[str, int], num_documents: int) -> None:
        check_arguments(DocumentFrequencies.__init__, locals())
        self.num_documents = check_positive_int("num_documents", num_documents)
        self.words = sorted(counts)
        self.counts = {word: counts[word] for word in self.words}
        self.number = {word: number for number, word in enumerate(self.words)}
        if counts and not 1 <= min(counts.values()) <= max(counts.values()) <= num_documents:
            raise ValueError(
                f"`counts` must lie between 1 and `num_documents`={num_documents}, got values from "
                f"{min(counts.values())} to {max(counts.values())}; count a word once per document"
            )

    @classmethod
    def from_texts(cls, texts: Iterable[str], tokenizer: Callable[[str], Iterable[str]]) -> "DocumentFrequencies":
        """Count words over texts, each one document.

        Args:
            texts: The documents, read once.
            tokenizer: Returns the words of a text, with or without repetitions.

        Returns:
            The frequencies.

        Raises:
            ValueError: If there is no text.
            TypeError: If ``texts`` is one string.
        """
        if isinstance(texts, str):
            raise TypeError("`texts` must be documents, got one string; put it into a list")
        counts: Counter[str] = Counter()
        documents = 0
        for text in texts:
            counts.update(set(tokenizer(text)))
            documents += 1
        if not documents:
            raise ValueError("`texts` must have at least one document, got none")
        return cls(dict(counts), documents)

    def at_least(self, documents: int) -> "DocumentFrequencies":
        """Keep only words with at least a given number of documents.

        Args:
            documents: The minimum number of documents.

        Returns:
            New frequencies over the same number of documents.
        """
        return DocumentFrequencies({w: n for w, n in self.counts.items() if n >= documents}, self.num_documents)

    def idf(self, words: Sequence[str] | None = None, *, variant: Variant = "bm25") -> Tensor:
        """Inverse document frequencies.

        Args:
            words: Words to look up; by default all, in numbered order.
            variant: As for `lightning_plugins.functional.inverse_document_frequency`.

        Returns:
            float64 tensor with one entry per word; unknown words count as occurring in no document.
        """
        check_arguments(DocumentFrequencies.idf, locals())
        chosen = self.words if words is None else words
        counts = torch.tensor([self.counts.get(word, 0) for word in chosen], dtype=torch.float64)
        return inverse_document_frequency(counts, self.num_documents, variant=variant)
