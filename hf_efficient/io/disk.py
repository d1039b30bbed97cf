"""The one place that writes into folders: complete or not at all, under names of our own, never through a link.

    write_atomic("out/report.json", text)                    # a reader sees the old file or the new one
    with new_folder("out/onnx") as temporary:              # "out/onnx" must be new or empty; it appears at the end
        model.save_pretrained(temporary)

    with clear_disk_errors("out/bbc-news", "Give the same command again: it goes on after the last finished stage."):
        model.save_pretrained("out/bbc-news/1-prune.partial")

Temporary names are made by the system, exclusively, so nothing of a user is ever taken for one of ours. A disk that is
full or fails is told in one message; the libraries that write for us say it each in their own way: OSError,
SafetensorError or a RuntimeError of torch.save.
"""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..errors import CheckpointError, HfEfficientError

TEMPORARY = ".hf-efficient-"  # every temporary name begins so: hidden, and never part of a result

FAULTS = {
    errno.ENOSPC: "Free some space.",
    errno.EDQUOT: "Free some space, or ask for a larger quota.",
    errno.EROFS: "Choose a folder that can be written.",
    errno.EIO: "Check the disk.",
}
# What torch.save says, without the reason, when it cannot write on.
_CUT_SHORT = ("PytorchStreamWriter failed writing file", "inline_container.cc")


@contextmanager
def clear_disk_errors(folder: str | os.PathLike, then: str) -> Iterator[None]:
    """Any such error within is a CheckpointError that names `folder`, and says what to do `then`."""
    try:
        yield
    except HfEfficientError:
        raise
    except Exception as error:
        fault = disk_fault(error)
        if fault is None:
            raise
        raise CheckpointError(f"{os.fspath(folder)} could not be written: {fault} {then}") from error


def disk_fault(error: BaseException) -> str | None:
    """What is wrong with the disk, and how to mend it; None for any other error."""
    text = str(error)
    for number, advice in FAULTS.items():
        name = os.strerror(number)
        if (isinstance(error, OSError) and error.errno == number) or f"{name} (os error {number})" in text:
            return f"{name}. {advice}"
    if isinstance(error, RuntimeError) and any(words in text for words in _CUT_SHORT):
        return f"a file was cut short, so the disk is full or fails. {FAULTS[errno.ENOSPC]}"
    return None


def write_atomic(path: str | os.PathLike, content: str | bytes) -> Path:
    """Write a file, complete or not at all; text as UTF-8. A link of that name is replaced, not followed."""
    target = Path(path)
    data = content.encode("utf-8") if isinstance(content, str) else content
    descriptor, name = tempfile.mkstemp(prefix=TEMPORARY, dir=target.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        os.chmod(name, 0o666 & ~current_umask())  # mkstemp makes it for its owner alone
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return target


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary file beside `path`, for a library to write into; it takes that place when the work is done."""
    target = Path(path)
    descriptor, name = tempfile.mkstemp(prefix=TEMPORARY, dir=target.parent)
    os.close(descriptor)
    try:
        yield Path(name)
        os.chmod(name, 0o666 & ~current_umask())
        os.replace(name, target)
    finally:
        Path(name).unlink(missing_ok=True)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder where the system keeps what is temporary (TMPDIR says where); afterwards it is gone."""
    folder = tempfile.mkdtemp(prefix=TEMPORARY)
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def kept_folder(folder: str | os.PathLike) -> Path:
    """The folder of a fixed name beside `folder`, in which it is made and which outlives a kill; `finish_folder` gives
    it that name. CheckpointError if `folder` is not empty."""
    target = check_empty(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    return own_folder(target.parent / f"{TEMPORARY}{target.name}")


def finish_folder(made: Path, folder: str | os.PathLike) -> None:
    """What `kept_folder` gave becomes `folder`."""
    target = check_empty(folder)
    if target.is_dir():
        target.rmdir()
    os.replace(made, target)


def check_space(folder: str | os.PathLike, needed: int) -> None:
    """CheckpointError if fewer than `needed` bytes are free where the folder lies."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"{os.fspath(folder)} has {free / 1e9:,.1f} GB free, and {needed / 1e9:,.1f} GB are needed. Free some "
            "space, choose a folder on another disk, or give fewer or shorter calibration texts."
        )


def check_name(folder: str | os.PathLike) -> Path:
    """The folder as a path; CheckpointError if its name is not UTF-8: safetensors and tokenizers open no other."""
    try:
        os.fspath(folder).encode("utf-8")
    except UnicodeEncodeError:
        raise CheckpointError(
            f"The name of the folder {os.fspath(folder)!r} is not UTF-8, so weights in it could not be read. Choose "
            "another one, or go into it and give a relative name."
        ) from None
    return Path(folder)


def check_empty(folder: str | os.PathLike) -> Path:
    """The folder as a path; CheckpointError if it is not empty, a file, a link to nowhere, or of a name not UTF-8."""
    target = check_name(folder)
    if target.is_file():
        raise CheckpointError(f"{target} is a file. Choose another output folder.")
    if target.is_symlink() and not target.exists():
        raise CheckpointError(
            f"{target} is a link to {os.readlink(target)}, which does not exist. Choose another folder."
        )
    if target.is_dir() and any(target.iterdir()):
        raise CheckpointError(f"{target} is not empty. Choose another output folder.")
    return target


@contextmanager
def new_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """A temporary folder beside `folder`, which must be new or empty and is replaced by it when the work within is
    done; after an error it goes."""
    target = check_empty(folder)
    target = Path(os.path.realpath(target)) if target.is_symlink() else target
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=target.parent))
    try:
        os.chmod(temporary, 0o777 & ~current_umask())
        yield temporary
        if target.is_dir():
            target.rmdir()  # it is empty, or this fails
        os.replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def own_folder(folder: str | os.PathLike) -> Path:
    """A folder of a fixed name that belongs to us, made if it is not there; CheckpointError for a file or a link in
    its place, or a link in it: what we write would go elsewhere."""
    target = Path(folder)
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise CheckpointError(f"{target} is a link or a file, where a folder of this run belongs. Remove it.")
    target.mkdir(exist_ok=True)
    if link := next((path for path in target.rglob("*") if path.is_symlink()), None):
        raise CheckpointError(f"{link} is a link, where a file or folder of this run belongs. Remove it.")
    return target


def own_file(path: str | os.PathLike) -> Path:
    """The place of a file of ours that others open for us; CheckpointError if something else stands there."""
    target = Path(path)
    if target.is_symlink() or (target.exists() and not target.is_file()):
        raise CheckpointError(f"{target} is a link or a folder, where a file of this run belongs. Remove it.")
    return target


def remove_own(folder: str | os.PathLike) -> None:
    """Delete a folder that `own_folder` made; what a link of that name leads to stays."""
    if not Path(folder).is_symlink():
        shutil.rmtree(folder, ignore_errors=True)


def inside(folder: str | os.PathLike, name: str | os.PathLike) -> Path:
    """`folder / name`; CheckpointError if that leads out of the folder once all links are followed."""
    path = Path(folder) / name
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise CheckpointError(f"{path} leads out of {os.fspath(folder)}. Put a copy of the file there in its place.")
    return path


def check_inside(folder: str | os.PathLike) -> None:
    """CheckpointError if something in the folder is a link that leads out of it."""
    for path in Path(folder).rglob("*"):
        inside(folder, path.relative_to(folder))


def copy_folder(source: str | os.PathLike, target: str | os.PathLike, leave_out: Sequence[str] = ()) -> None:
    """The files of a folder, and of those in it, again; weights without using their space twice.

    `leave_out`: names that stay behind. What lies at the other end of a link within the folder becomes a file.

    Raises:
        CheckpointError: a link leads out of the folder.
    """
    for path in sorted(Path(source).rglob("*")):
        name = path.relative_to(source)
        if name.name in leave_out or not inside(source, name).is_file():
            continue
        (Path(target) / name).parent.mkdir(parents=True, exist_ok=True)
        (link_or_copy if path.suffix == ".safetensors" else shutil.copy2)(path, Path(target) / name)


def copy_file(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """A file again, with its times; what a link leads to becomes a file."""
    shutil.copy2(source, target)


def link_or_copy(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """The same file under a second name; a copy where the file system has no hard links."""
    try:
        os.link(source, target, follow_symlinks=False) if not os.path.islink(source) else shutil.copy2(source, target)
    except OSError:
        shutil.copy2(source, target)


def current_umask() -> int:
    """The permissions that new files of this process lack."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
