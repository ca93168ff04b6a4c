"""Whether bytes are the content that a row names."""

from sublet_broker.market.facts import ContentFact
from sublet_contracts.digests import digest_of


def is_content(content: ContentFact, data: bytes) -> bool:
    """Say whether these bytes are that content."""
    return len(data) == content.size_bytes and digest_of(data) == content.digest
