"""Filters for messages of libraries that are expected in a training and need no action of the user."""

import logging
import re
import warnings

_LOGGERS = ("transformers.modeling_utils", "transformers.configuration_utils")
_STATUS = re.compile(r"^(.*?) *\|[^A-Z\n]*([A-Z]{3,})\b", re.MULTILINE)  # key and status in transformers' load report
_NEW_HEAD = (
    "the base has no reconstruction head (autoregressive_module): it is new, and starts as a copy of the last frame"
)
_WARNINGS = (
    # transformers' own use of its own old name
    ("`is_gradient_checkpointing` is deprecated", FutureWarning),
    # --check states workers and cores, once
    ("This DataLoader will create", UserWarning),
    # a CPU has no device memory to pin for
    ("'pin_memory' argument is set as true but no accelerator is found", UserWarning),
)


class ExpectedMessages(logging.Filter):
    """Shortens the load report of a base whose head alone is new, and drops the warning about the base's model type."""

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if "of type `llava_onevision` to instantiate a model of type `llava_next_ar`" in text:
            return False  # that is how a base is loaded
        rows = _STATUS.findall(text) if "LOAD REPORT" in text else []
        # The whole head is missing, not a part of it: every head has this last layer, whatever its size.
        is_new = any(key.startswith("autoregressive_module.change.") for key, _ in rows)
        if is_new and all(key.startswith("autoregressive_module.") and status == "MISSING" for key, status in rows):
            record.msg, record.args = _NEW_HEAD, ()
        return True


def quiet_expected_messages() -> None:
    """Install the filters for the rest of the process. Any other message stays."""
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        if not any(isinstance(present, ExpectedMessages) for present in logger.filters):
            logger.addFilter(ExpectedMessages())
    for message, category in _WARNINGS:
        warnings.filterwarnings("ignore", message=re.escape(message), category=category)
