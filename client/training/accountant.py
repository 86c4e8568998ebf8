"""The second opinion on epsilon: Opacus' PRV accountant (Gopi, Lee, Wutschitz 2021, arXiv 2106.02848).

It is independent of dp-accounting's PLD: another method, another code base. A hospital enforces the larger of
both and stops when they disagree. Opacus and torch take seconds to import, so that waits for the first call.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from functools import lru_cache
from types import MappingProxyType

from fedmedgan.shared.errors import PrivacyError
from fedmedgan.shared.privacy.accounting import (
    Accountant,
    accountant_error,
    epsilon_pld,
    epsilon_rdp,
    is_hopeless,
)
from fedmedgan.shared.privacy.events import TrainingSteps, check_delta, merge


def epsilon_prv(events: Iterable[TrainingSteps], delta: float) -> float:
    """Epsilon by privacy random variables: an upper bound, about `accountant_error` above the true value.

    Args:
        events: everything that was done, in any order.
        delta: 1e-10 to 0.1.

    Raises:
        PrivacyError: PRIVACY_RANGE; PRIVACY_ACCOUNTANTS, Opacus gave up.

    ==========================  =======================================================================
    case                        result
    ==========================  =======================================================================
    no events, or 0 steps       0.0 (Opacus alone raises ValueError)
    several (sigma, q)          composed; slow (about 0.5 s for each, see docs/decisions/0005)
    RDP's bound exceeds 300     RDP's bound, which is larger
    delta outside its range     PRIVACY_RANGE, before Opacus sees it
    ==========================  =======================================================================
    """
    return _epsilon_prv(tuple(merge(events)), check_delta(delta))


@lru_cache(maxsize=1024)
def _epsilon_prv(events: tuple[TrainingSteps, ...], delta: float) -> float:
    if not events or is_hopeless(events, delta):
        return epsilon_rdp(events, delta)
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(e.noise_multiplier, e.sampling_rate, e.steps) for e in events]
    # PLD's answer only chooses how fine PRV's grid is. PRV adds the error of that grid to its own answer.
    error = accountant_error(epsilon_pld(events, delta), sum(e.steps for e in events))
    try:
        with warnings.catch_warnings():
            # Opacus warns where its RDP bound, used for the width of the grid alone, is not the tightest.
            warnings.simplefilter("ignore")
            epsilon = float(accountant.get_epsilon(delta, eps_error=error))
    except (ArithmeticError, ValueError, RuntimeError) as problem:
        raise PrivacyError("PRIVACY_ACCOUNTANTS", f"Opacus' PRV gave up: {problem}") from None
    return max(0.0, epsilon)


ENFORCED: Mapping[str, Accountant] = MappingProxyType({"pld": epsilon_pld, "prv": epsilon_prv})
"""What a hospital enforces the larger of."""
