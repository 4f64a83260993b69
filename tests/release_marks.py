"""Marks for tests of what the oldest supported releases cannot do. They are skipped there with the reason, and counted."""

import pytest
import transformers
from packaging import version


def since_transformers(release: str, why: str) -> pytest.MarkDecorator:
    found = version.parse(transformers.__version__)
    return pytest.mark.skipif(found < version.parse(release), reason=f"needs transformers {release}: {why}")
