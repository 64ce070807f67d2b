"""Strings with a format, as regular expressions that every reader of the format accepts.

llguidance has its own for the others; of dates it lets through some that no calendar has.
"""

_DAY = (
    r"(?:(?:000[1-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-9][0-9]{3})-"
    r"(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))"
    # the 29th of February: years of four, without the hundreds that four does not divide
    r"|(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)-02-29)"
)
_CLOCK = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?"
_ZONE = r"(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_COUNT = r"(?:0|[1-9][0-9]{0,4})"
_TIMES = rf"T(?:{_COUNT}H(?:{_COUNT}M(?:{_COUNT}S)?)?|{_COUNT}M(?:{_COUNT}S)?|{_COUNT}S)"  # no gap, as RFC 3339 has it
_DATES = rf"(?:{_COUNT}Y(?:{_COUNT}M(?:{_COUNT}D)?)?|{_COUNT}M(?:{_COUNT}D)?|{_COUNT}D)"

PATTERNS = {
    "date": f"^{_DAY}$",
    "time": f"^{_CLOCK}{_ZONE}$",
    "date-time": f"^{_DAY}T{_CLOCK}{_ZONE}$",
    "duration": rf"^P(?:{_COUNT}W|{_DATES}(?:{_TIMES})?|{_TIMES})$",
}
# of numbers, as OpenAPI has them: the bounds; of 64 bits those up to which doubles are exact
BOUNDS = {"int32": (-(2**31), 2**31 - 1), "int64": (-(10**15), 10**15), "float": (), "double": (), "password": ()}
KNOWN = (*PATTERNS, *BOUNDS, "email", "hostname", "ipv4", "ipv6", "uri", "uuid")
