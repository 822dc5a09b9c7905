"""The errors a user may meet. Each message says what was wrong, where, and what to do about it."""


class NeoError(Exception):
    """Base of every error neo raises on purpose. The command line prints it as one line and exits with 2."""


class InputError(NeoError):
    """Something the user gave is wrong: a file, a field of a row, a name, an option."""


class PlanError(NeoError):
    """A policy returned a plan that breaks an invariant. Nothing of the plan has been applied.

    Attributes:
        rule: name of the broken rule, e.g. ``"gpu-blocks"`` (see ``neo.core.validate.RULES``).
        request_id: the offending request, or None if the rule concerns the whole step.
    """

    def __init__(self, rule: str, message: str, request_id: str | None = None) -> None:
        self.rule = rule
        self.request_id = request_id
        where = f" (request {request_id})" if request_id is not None else ""
        super().__init__(f"invalid plan, rule '{rule}'{where}: {message}")


class PolicyError(NeoError):
    """A policy raised an exception, returned something that is not a plan, or could not be loaded."""
