"""All targets, by name."""

import fuzz_exchange
import fuzz_pages
import fuzz_request
import fuzz_wire
from fuzz_target import Target

TARGETS: dict[str, Target] = {
    target.name: target for module in (fuzz_request, fuzz_pages, fuzz_wire, fuzz_exchange) for target in module.TARGETS
}
