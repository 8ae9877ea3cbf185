"""What came of the specs, as tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tests.e2e.suite import Spec, Verdict

_SHOWN = (Verdict.PASSED, Verdict.FAILED, Verdict.SKIPPED, Verdict.EXCLUDED)


def text(specs: Sequence[Spec]) -> str:
    """Counts by suite; then why specs were skipped or excluded; then each that failed, and with what words."""
    parts = [_counts(specs)]
    parts += [_reasons(specs, verdict) for verdict in (Verdict.SKIPPED, Verdict.EXCLUDED)]
    for spec in specs:
        if spec.verdict is Verdict.FAILED:
            parts.append(f"FAILED [{spec.pattern}] {spec.suite} {spec.claim}\n{spec.why}")
    return "\n\n".join(part for part in parts if part)


def _counts(specs: Sequence[Spec]) -> str:
    suites = list(dict.fromkeys(spec.suite for spec in specs if spec.verdict in _SHOWN))
    counted = Counter((spec.suite, spec.verdict) for spec in specs)
    width = max(map(len, (*suites, "suite")))
    lines = [f"{'suite':<{width}}" + "".join(f"{verdict:>10}" for verdict in _SHOWN)]
    lines += [f"{suite:<{width}}" + "".join(f"{counted[suite, verdict]:>10}" for verdict in _SHOWN) for suite in suites]
    sums = Counter(spec.verdict for spec in specs)
    lines.append(f"{'':<{width}}" + "".join(f"{sums[verdict]:>10}" for verdict in _SHOWN))
    return "\n".join(lines)


def _reasons(specs: Sequence[Spec], verdict: Verdict) -> str:
    reasons = Counter(spec.why for spec in specs if spec.verdict is verdict)
    return "\n".join(f"{count:>4} {verdict}: {reason}" for reason, count in reasons.most_common())
