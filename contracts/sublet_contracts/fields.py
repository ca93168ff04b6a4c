"""The fields that documents and messages are made of: types with their bounds and their meaning."""

from typing import Annotated

from pydantic import Field

from sublet_contracts.digests import PATTERN as DIGEST_PATTERN
from sublet_contracts.encoding import MAX_INTEGER
from sublet_contracts.keys import PARTY_PATTERN

Party = Annotated[str, Field(pattern=PARTY_PATTERN, description="a party id: the public key")]
DocumentId = Annotated[
    str,
    Field(
        pattern=r"^[0-9a-f]{64}$",
        description="SHA-256 of a document's type and payload",
        json_schema_extra={"format": "document-id"},
    ),
]
Digest = Annotated[
    str, Field(pattern=rf"^{DIGEST_PATTERN}$", description="names content by algorithm and hash")
]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of what it says")]
Count = Annotated[int, Field(ge=0, le=MAX_INTEGER)]
Nonce = Annotated[str, Field(pattern=r"^[0-9a-f]{16,64}$", description="random hex digits")]
Text = Annotated[str, Field(max_length=256)]
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._ /:@+-]*$"
_LABEL = r"^[a-z0-9][a-z0-9.-]*$"
Name = Annotated[str, Field(max_length=128, pattern=_NAME)]
Label = Annotated[str, Field(max_length=64, pattern=_LABEL)]

_USER = r"^([a-z_][a-z0-9_-]{0,31}|[1-9][0-9]{0,8}(:[1-9][0-9]{0,8})?)?$"
User = Annotated[str, Field(pattern=_USER)]
"""As whom a job runs; '' where it has no wish."""

PATTERNS_IN_WORDS = {
    _USER: "use UID, UID:GID (neither is 0) or a name in small letters",
    _NAME: "use letters, digits, spaces and . _ / : @ + -, with a letter or a digit first",
    _LABEL: "use small letters, digits, . and -, with a letter or a digit first",
}
"""What people may write where a field has one of these patterns."""
DeviceId = Annotated[str, Field(max_length=96, pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]*$")]

PinnedImage = Annotated[
    str,
    Field(max_length=512, pattern=r"^(?:(?:[A-Za-z0-9._:/\[\]-]+@)?sha256:[0-9a-f]{64})?$"),
]
"""An image by its content: REGISTRY/REPOSITORY@sha256:..., or the id of an owner's local one; ''
where none is named."""

Issued = Annotated[Count, Field(description="when it was signed; ms since 1970")]
Broker = Annotated[Party, Field(description="the one broker that it is meant for")]
Provider = Annotated[Party, Field(description="who owns the devices")]
Renter = Annotated[Party, Field(description="who submits and pays")]
JobId = Annotated[DocumentId, Field(description="id of the job's document")]
LeaseId = Annotated[DocumentId, Field(description="id of the lease's document")]
Epoch = Annotated[
    int, Field(ge=1, le=MAX_INTEGER, description="the lease's epoch: writes of an older one fail")
]
