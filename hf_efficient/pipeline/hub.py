"""A finished result onto the Hugging Face Hub: model, tokenizer, exports, report, page, plots, recipe, and the card.

    push("out/bbc-news", "me/bbc-fast", dry_run=True)        # what would be uploaded
    push("out/bbc-news", "me/bbc-fast")                      # private unless private=False

One commit, so that a reader never sees half of it. Called again after a failure it sends only what is not there yet.
"""

import email.utils
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, ConfigError, shown
from ..io.codec import clean
from ..io.disk import inside
from ..io.text import for_line
from ..reporting.card import model_card, plots_in
from ..reporting.page import PAGE, report_page
from ..reporting.schema import REPORT_FILE, Report, load_report
from .workspace import MANIFEST, MODEL, RECIPE

if TYPE_CHECKING:
    from huggingface_hub import HfApi

TRIES = 4
PATIENCE = 120.0  # seconds without a byte from the server, after which a request has failed
LONGEST_WAIT = 300.0  # seconds between tries, whatever the server asks for
# The first part of an address on the Hub that is not a user.
_KINDS = ("models", "datasets", "spaces", "kernels", "buckets", "api")
# What a client that reads the answer of something that is no Hub stumbles over.
_NONSENSE = (ValueError, KeyError, TypeError, AttributeError, IndexError, AssertionError, RecursionError)


@dataclass(frozen=True)
class Pushed:
    """What was uploaded, or would be: path in the repository -> bytes. `private` is what the repository is."""

    repo_id: str
    private: bool
    files: dict[str, int]
    url: str | None = None


def result_folder(folder: str | Path) -> Path:
    """The folder of a result: itself, or `model` in that of a run."""
    folder = Path(folder)
    inside = folder / MODEL
    return inside if not (folder / REPORT_FILE).is_file() and (inside / REPORT_FILE).is_file() else folder


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    dry_run: bool = False,
    token: str | None = None,
    endpoint: str | None = None,
    wait: Callable[[float], None] = time.sleep,
) -> Pushed:
    """Upload the result in `folder` to the model repository `repo_id`, which is made if it is not there.

    Parameters:
        folder: that of a run or of its `model`.
        repo_id: `user/name`. Card and page are written for it.
        private: of a new repository; one that is there keeps what it is.
        dry_run: upload nothing, and talk to nobody.
        token: default: that of `hf auth login` or HF_TOKEN.
        endpoint: of another Hub; default: HF_ENDPOINT.
        wait: what waits between tries, for tests.

    Raises:
        ConfigError: a name that no repository can have, or a token that no server could be given.
        CheckpointError: the folder holds no complete result, or the Hub cannot be reached or refuses.
    """
    _check_repo_id(repo_id)
    secret = _checked_token(token)
    source = result_folder(folder)
    if source != Path(folder):
        inside(folder, MODEL)
    report = load_report(source)
    if not (source / "config.json").is_file() or not any(source.glob("*.safetensors")):
        raise CheckpointError(f"{source} has a report but no model (config.json, *.safetensors). Push a finished run.")
    contents = collect(source, report, repo_id)
    files = {name: len(what) if isinstance(what, bytes) else what.stat().st_size for name, what in contents.items()}
    _operations(contents)
    if dry_run:
        return Pushed(repo_id, private, files)
    url, is_private = _upload(repo_id, contents, private, secret, endpoint, wait)
    return Pushed(repo_id, is_private, files, url)


def _check_repo_id(repo_id: str) -> None:
    """By huggingface_hub's own rules for names, and those of a model: `user/name`."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    user = repo_id.partition("/")[0] if isinstance(repo_id, str) else ""
    try:
        validate_repo_id(repo_id)
        good = (
            "/" in repo_id and user not in _KINDS and not any(part.endswith((".", "-")) for part in repo_id.split("/"))
        )
    except HFValidationError:
        good = False
    if not good:
        raise ConfigError(
            "repo_id must be user/name, up to 96 letters a to z, digits, '.', '_' and '-' in all, without '--', '..' "
            f"or a '.git' at the end, and neither part begins or ends with '.' or '-'; got {shown(repo_id)}."
        )


def _checked_token(token: str | None) -> str | None:
    """The token that is sent, and never shown; ConfigError if it could not stand in a header."""
    from huggingface_hub import get_token

    secret = token.strip() if token is not None else get_token()
    if secret and not re.fullmatch(r"[!-~]+", secret):
        raise ConfigError(
            "The token holds a space, a line break or a letter beyond ASCII, so it is none of the Hub. Copy it again: "
            "to HF_TOKEN, through `hf auth login`, or as the argument `token`."
        )
    return secret or None


def _operations(contents: dict[str, Path | bytes]) -> list[Any]:
    """The parts of the commit, new for each try, as an operation remembers what became of it; CheckpointError for a
    file that cannot be read, or has a name that no repository takes."""
    from huggingface_hub import CommitOperationAdd

    operations = []
    for name, what in contents.items():
        try:
            name.encode("utf-8")
            operations.append(CommitOperationAdd(name, str(what) if isinstance(what, Path) else what))
        except (ValueError, OSError) as error:
            raise CheckpointError(
                f"The file {shown(name)} cannot be uploaded: {for_line(str(error))[:300]} Rename or remove it."
            ) from error
    return operations


def collect(source: Path, report: Report, repo_id: str) -> dict[str, Path | bytes]:
    """Path in the repository -> file or content, in order, without hidden and half-written files; CheckpointError if
    a link leads out of the folder: what lies there was not meant to be published."""
    import yaml

    contents: dict[str, Path | bytes] = {}
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source)
        hidden = any(part.startswith(".") or part.endswith((".partial", ".part")) for part in name.parts)
        if not hidden and inside(source, name).is_file() and name.name != MANIFEST:
            contents[name.as_posix()] = path
    if report.recipe:
        contents[RECIPE] = yaml.safe_dump(report.recipe, sort_keys=False, allow_unicode=True).encode()
    contents["README.md"] = str(model_card(report, repo_id, plots_in(source))).encode()
    contents[PAGE] = report_page(report, repo_id=repo_id).encode()
    return contents


def _upload(
    repo_id: str,
    contents: dict[str, Path | bytes],
    private: bool,
    token: str | None,
    endpoint: str | None,
    wait: Callable[[float], None],
) -> tuple[str, bool]:
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        raise CheckpointError("HF_HUB_OFFLINE is set, so nothing can be pushed. Unset it.")
    api = HfApi(endpoint=endpoint, token=token, library_name="hf_efficient")

    def attempt() -> tuple[str, bool]:
        api.create_repo(repo_id, private=private, exist_ok=True)
        is_private = bool(api.model_info(repo_id, timeout=PATIENCE).private)  # one that was there stays what it is
        message = "Upload a model compressed with hf_efficient"
        api.create_commit(repo_id, _operations(contents), commit_message=message)
        return f"{api.endpoint}/{repo_id}", is_private

    with _patient_for_so_long():
        return _trying(attempt, api, repo_id, wait)


@contextmanager
def _patient_for_so_long() -> Iterator[None]:
    """Within, every request of huggingface_hub has a limit, which by itself it has not.

    Nor can a server ask it for longer waits than we would make.
    """
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http

    usual = getattr(_http, "_GLOBAL_CLIENT_FACTORY", _http.default_client_factory)

    def bounded(response: Any) -> None:
        pause = _seconds_to_wait(response)
        for name in ("Retry-After", "RateLimit"):
            response.headers.pop(name, None)
        if pause:
            response.headers["Retry-After"] = str(round(pause))

    def limited() -> Any:
        client = usual()
        client.timeout = PATIENCE
        client.event_hooks["response"].append(bounded)
        return client

    set_client_factory(limited)
    try:
        yield
    finally:
        set_client_factory(usual)


def _trying(
    attempt: Callable[[], tuple[str, bool]], api: "HfApi", repo_id: str, wait: Callable[[float], None]
) -> tuple[str, bool]:
    """Again after what may pass: no connection, or a fault of the server.

    huggingface_hub tries uploads of files again by itself, but neither the repository nor the commit; it reads
    Retry-After only in seconds, and waits as long as a server says.
    """
    for number in range(1, TRIES + 1):
        try:
            return attempt()
        except Exception as error:
            if isinstance(error, CheckpointError):  # a file that is not there any more
                raise
            cause: BaseException | None = error
            while cause is not None and not _is_from_the_net(cause):
                cause = cause.__cause__ or cause.__context__
            nonsense = cause is None and isinstance(error, _NONSENSE)
            if cause is None and not nonsense:
                raise
            cause = cause or error
            response = getattr(cause, "response", None)
            status = None if response is None else response.status_code
            if nonsense or number == TRIES or (status is not None and status < 500 and status != 429):
                raise CheckpointError(
                    f"Cannot push to {repo_id} at {clean(api.endpoint)}: {_reason(cause, status, api.token)}"
                ) from None
            wait(max(2.0**number, _seconds_to_wait(response)))
    raise AssertionError("unreachable")


def _is_from_the_net(error: BaseException) -> bool:
    """Of the Hub's client, or of the library below it, which is another one in each of its versions."""
    from huggingface_hub.errors import HfHubHTTPError

    below = any(kind.__module__.split(".")[0] in ("httpx", "httpx2", "requests") for kind in type(error).__mro__)
    return below or isinstance(error, HfHubHTTPError | ConnectionError)


def _seconds_to_wait(response: Any) -> float:
    """What a busy server asks for, in seconds or as a date; 0 where it says nothing that can be read."""
    header = "" if response is None else str(response.headers.get("Retry-After", "")).strip()
    if header.isascii() and header.isdigit():
        return min(float(header[:9]), LONGEST_WAIT)
    try:
        seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError, IndexError):
        return 0.0
    return min(max(seconds, 0.0), LONGEST_WAIT)


def _reason(error: BaseException, status: int | None, token: str | bool | None) -> str:
    """What to do, and what the server said, without the token or anything that looks like one."""
    advice = {
        401: "no valid token was given. Log in with `hf auth login`, or set HF_TOKEN.",
        403: "the token may not write there. Take one with write access to that name.",
        404: "there is no such user or organisation, or the token may not see it.",
        409: "the repository was changed at the same time. Push again.",
        429: "too many requests. Wait some minutes, then push again; what was uploaded is kept.",
    }.get(status or 0, "the Hub did not answer as it should; what was uploaded is kept, so push again later.")
    if isinstance(error, _NONSENSE):
        advice = "what answers there does not speak as the Hub does. Check HF_ENDPOINT and the network."
    answer = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    answer = answer.replace(token, "[removed]") if isinstance(token, str) else answer
    return f"{advice} ({clean(for_line(answer)[:300])})"
