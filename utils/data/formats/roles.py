"""The roles that columns of the user's own data can have, and `--columns`, which gives columns roles."""

from utils.data.formats.conversations import ANSWER_ROLES, INPUT_ROLES, OF_TOKENS, PROMPT_ROLES, TALK_ROLES
from utils.errors import UserError

BESIDE = ("system", "history", "tools")  # what may stand beside a prompt and its answer
OPTIONAL = ("rejected", *OF_TOKENS, *INPUT_ROLES, *BESIDE)
ROLE_NAMES = (
    *TALK_ROLES,
    *PROMPT_ROLES,
    *ANSWER_ROLES,
    "rejected",
    *INPUT_ROLES,
    *BESIDE,
    "text",
    "input_ids",
    *OF_TOKENS,
)


def parse_columns(text: str | None) -> dict[str, str]:
    """Parse `ROLE=COLUMN,ROLE=COLUMN` into a dict of columns by role.

    Raises:
        UserError: the text is not of that form, or names an unknown role or one role twice.
    """
    columns: dict[str, str] = {}
    for pair in (text or "").split(",") if text is not None else ():
        role, sign, column = (part.strip() for part in pair.partition("="))
        if not sign or not column or role not in ROLE_NAMES:
            raise UserError(
                f'--columns "{text}": {pair!r} is not ROLE=COLUMN with one of the roles {", ".join(ROLE_NAMES)}.'
            )
        if role in columns:
            raise UserError(f'--columns "{text}" names {role} twice.')
        columns[role] = column
    return columns
