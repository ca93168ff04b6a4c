"""Which addresses a renter's image may come from: public ones. Pure.

A renter names the registry, and the owner's engine speaks to it: without this rule he would have it
speak to the owner's router, to the metadata service of a cloud, or to this machine itself.

Not covered: the engine looks the host up again by itself, so a name that answers differently the
second time gets past; and it follows a registry's redirects and the address of its login server
wherever they lead. What comes back from there never reaches the renter: content has to fit its
hash, and errors are told in words of ours. A firewall on the engine covers that as well.
"""

import ipaddress
from collections.abc import Collection

from sublet_contracts.image_references import DEFAULT_REGISTRY, ImageReference, host_and_port

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_LOW_32_BITS = 2**32 - 1


def is_public(address: str) -> bool:
    """Say whether an address belongs to the public internet; what is no address doesn't."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv6Address):
        if found in _NAT64:
            return is_public(str(ipaddress.IPv4Address(int(found) & _LOW_32_BITS)))
        inner = found.ipv4_mapped or found.sixtofour or (found.teredo and found.teredo[1])
        if inner:
            return is_public(str(inner))
        if found.is_site_local:
            return False
    return found.is_global and not found.is_multicast


def needs_no_look(reference: ImageReference, allowed: Collection[str]) -> bool:
    """Say whether a registry may be used whatever its address: Docker's own, which the engine
    itself is set up for, or one that the owner names, with its port or for all of them."""
    registry = reference.registry
    if registry == DEFAULT_REGISTRY or registry in allowed:
        return True
    host, _ = host_and_port(registry)
    return (f"[{host}]" if ":" in host else host) in allowed


def why_not(addresses: Collection[str]) -> str:
    """Return why a registry at these addresses isn't asked; '' if it may be."""
    if not addresses:
        return "it has no address"
    if not all(map(is_public, addresses)):
        return "its address is not a public one"
    return ""
