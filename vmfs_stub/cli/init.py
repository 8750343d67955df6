"""`init`: makes a datastore: configuration, directories, and the store (or a place in one that exists).

What can be refused by looking is refused before anything is made.  Then come backing directory, store, mountpoint and
configuration: what is hard to take back comes late, so that a failed `init` can simply be repeated.
"""

from __future__ import annotations

import errno
import json
import os
import re
import sys
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import unquote, urlsplit

import typer

from vmfs_stub.cli.context import config_path_of, has_maps
from vmfs_stub.cli.in_place import backing_for, check_directory, refuse_running_domains, renamed
from vmfs_stub.cli.output import say, warn
from vmfs_stub.cli.store_keys import key_to_be
from vmfs_stub.core.errors import (
    AlreadyExists,
    ConfigError,
    CorruptStoreObject,
    ObjectMissing,
    PrimaryIOError,
    UnknownFormat,
    Unsupported,
    WrongStore,
)
from vmfs_stub.core.names import XATTR_PREFIX
from vmfs_stub.mount.mountpoint import make_immutable, mounts_at

if TYPE_CHECKING:
    from vmfs_stub.config import Config
    from vmfs_stub.store.objects import ObjectStore
    from vmfs_stub.store.store import Store

_SYSTEMD_RUNS = Path("/run/systemd/system")


def init(
    ctx: typer.Context,
    store: Annotated[str, typer.Option(help="Secondary storage: file:///absolute/path or s3://bucket/prefix")],
    backing: Annotated[
        Path | None, typer.Option(help="Directory for the image files themselves, on one filesystem.")
    ] = None,
    mountpoint: Annotated[Path | None, typer.Option(help="Directory where hypervisors see them.")] = None,
    in_place: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Instead of both: this directory of images is renamed, and mounted there."),
    ] = None,
    replica: Annotated[
        str | None, typer.Option(metavar="URL", help="A second store, which is to hold the same restore points.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the datastore; else made from the mountpoint.")] = None,
    runtime_dir: Annotated[
        Path | None, typer.Option(help="Control socket, volatile maps and log; else /run/vmfs-stub/NAME.")
    ] = None,
    encrypt: Annotated[bool, typer.Option("--encrypt", help="If the store is new, encrypt all that it holds.")] = False,
    key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Key file of the store; made with --encrypt if there is none.")
    ] = None,
    passphrase_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Instead: a file that holds a passphrase of the store.")
    ] = None,
    libvirt: Annotated[
        str | None, typer.Option(metavar="URI", help="The libvirt that runs the VMs, or none; else it is looked for.")
    ] = None,
) -> None:
    """Write a commented configuration, make the directories, create or join the store; overwrites nothing.

    With --in-place the datastore is mounted, too, so that the images are at their old path again.
    """
    from vmfs_stub.store.objects_url import StoreAt, open_objects

    backing, mountpoint = _places(backing, mountpoint, in_place)
    target = config_path_of(ctx)
    if os.path.lexists(target):
        raise AlreadyExists(f"{target} exists already; it was not changed: name another file with --config")
    text = _config_text(
        name=name or _name_of(mountpoint),
        backing=_real(backing),
        mountpoint=_real(mountpoint),
        runtime_dir=None if runtime_dir is None else _real(runtime_dir),
        store=_store_url(store),
        replica=None if replica is None else _store_url(replica),
        key_file=None if key_file is None else key_file.absolute(),
        passphrase_file=None if passphrase_file is None else passphrase_file.absolute(),
        libvirt=libvirt,
    )
    config = _checked(text, target)
    _check_key(config, encrypt=encrypt)
    at = StoreAt.of(config.store)
    objects, place = open_objects(at, create=True), at.replica(config.replica)
    replica_objects = None if place is None else open_objects(place, create=True)
    if in_place is None:
        _check_mountpoint(config.datastore.mountpoint)
    else:
        refuse_running_domains(config.datastore.mountpoint, config.libvirt)
        check_directory(config.datastore.mountpoint, config.datastore.backing)
        probe_xattrs(config.datastore.mountpoint)
    for url in filter(None, (config.store.url, config.replica.url)):
        _check_store_parent(url, config.datastore.backing)
    _make_parent(target)
    if in_place is None:
        _make_backing(config.datastore.backing)
        _tell_of_other_host(config)
    joined = _join_store(objects, config, encrypt=encrypt)
    if replica_objects is not None:
        _join_replica(joined, replica_objects, config.replica.url)
    if in_place is not None:
        _init_in_place(config, target, text)
        return
    _make_mountpoint(config.datastore.mountpoint)
    _write_new(target, text)
    say(f"wrote {target}; look at it, then run `vmfs-stub mount`")
    _say_units(target)


def _say_units(target: Path, *, is_mounted: bool = False) -> None:
    """How systemd serves the datastore and backs it up every night; its units find configurations in one place."""
    from importlib import resources

    if target.parent != Path("/etc/vmfs-stub") or not _SYSTEMD_RUNS.is_dir():
        return
    units, name = resources.files("vmfs_stub").joinpath("units"), target.stem
    say("to have systemd mount it, and back it up every night:")
    if not any(Path(directory, "vmfs-stub").exists() for directory in ("/usr/local/bin", "/usr/bin")):
        say(f"  ln -s {os.path.abspath(sys.argv[0])} /usr/local/bin/vmfs-stub")
    say(f"  cp {units}/* /etc/systemd/system/ && systemctl daemon-reload")
    if is_mounted:
        say(f"  vmfs-stub --config {target} unmount")
    say(f"  systemctl enable --now vmfs-stub@{name}.service vmfs-stub-backup@{name}.timer")


def _places(backing: Path | None, mountpoint: Path | None, in_place: Path | None) -> tuple[Path, Path]:
    """Backing directory and mountpoint."""
    if in_place is not None:
        if mountpoint is not None:
            raise ConfigError("--in-place names the mountpoint: leave out --mountpoint")
        return (backing_for(_real(in_place)) if backing is None else backing), _real(in_place)
    if backing is None or mountpoint is None:
        raise ConfigError("name --backing and --mountpoint, or --in-place with a directory of images")
    return backing, mountpoint


def _init_in_place(config: Config, target: Path, text: str) -> None:
    """Until the configuration is written, whatever fails is undone."""
    from vmfs_stub.cli.mount import mount_in_background

    datastore = config.datastore
    with renamed(datastore.mountpoint, datastore.backing):
        _make_mountpoint(datastore.mountpoint)
        _write_new(target, text)
    say(f"wrote {target}; the images are in {datastore.backing} now, and are mounted where they were")
    say("VMs stay defined as they are, and storage pools active; `vmfs-stub leave` makes it an image directory again")
    mount_in_background(config, target)
    _say_units(target, is_mounted=True)


def _check_key(config: Config, *, encrypt: bool) -> None:
    """What opens the store is there and usable, or is a key file that is to be made."""
    from vmfs_stub.store.key_sources import source_of

    settings = config.store
    if encrypt and settings.key_file is None and settings.passphrase_file is None:
        raise ConfigError("--encrypt: what is to open the store? name --key-file FILE or --passphrase-file FILE")
    if not encrypt or settings.key_file is None or os.path.lexists(settings.key_file):
        source_of(settings)


def _real(path: Path) -> Path:
    """Symlinks resolved, so that directories that are really nested are seen to be."""
    return Path(os.path.realpath(path))


def _name_of(mountpoint: Path) -> str:
    cleaned = re.sub(r"[^A-Za-z0-9._-]+", "-", _real(mountpoint).name).lstrip("._-")[:64]
    return cleaned or "datastore"


def _store_url(store: str) -> str:
    return Path(store).absolute().as_uri() if store.startswith("/") else store


def _config_text(
    *,
    name: str,
    backing: Path,
    mountpoint: Path,
    runtime_dir: Path | None,
    store: str,
    replica: str | None = None,
    key_file: Path | None = None,
    passphrase_file: Path | None = None,
    libvirt: str | None = None,
) -> str:
    from vmfs_stub.config import RUNTIME_ROOT

    values = {
        "NAME": name,
        "BACKING": str(backing),
        "MOUNTPOINT": str(mountpoint),
        "RUNTIME_DIR": str(runtime_dir or RUNTIME_ROOT / name),
        "STORE": store,
    }
    template = files("vmfs_stub.cli").joinpath("config.toml.in").read_text(encoding="utf-8")
    quoted = {key: _quoted(value) for key, value in values.items()}
    keys = {"key_file": key_file, "passphrase_file": passphrase_file}
    named = [f"{key} = {_quoted(str(path))}" for key, path in keys.items() if path is not None]
    quoted["KEY"] = "\n".join(named or [f'# {key} = ""' for key in keys])
    quoted["REPLICA"] = f"{'# ' if replica is None else ''}url = {_quoted(replica or '')}"
    uri = f"uri = {_quoted(libvirt or 'qemu:///system')}"
    known = {None: f'# enabled = "auto"\n# {uri}', "none": 'enabled = false\n# uri = "qemu:///system"'}
    quoted["LIBVIRT"] = known.get(libvirt, f"enabled = true\n{uri}")
    return re.sub(r"@([A-Z_]+)@", lambda match: quoted[match[1]], template)


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON's strings are TOML's, but for DEL


def _checked(text: str, target: Path) -> Config:
    from vmfs_stub.config import parse_config, refuse_nesting

    try:
        text.encode("utf-8")
    except UnicodeEncodeError as exc:
        raise ConfigError("a path is not UTF-8: TOML cannot hold it; use another directory") from exc
    config = parse_config(text, origin=str(target))
    datastore = config.datastore
    places = {"store": _store_directory(config.store.url), "replica": _store_directory(config.replica.url)}
    stores = {name: directory for name, directory in places.items() if directory is not None}
    if stores:
        try:
            refuse_nesting({"backing": datastore.backing, "mountpoint": datastore.mountpoint, **stores})
        except ValueError as exc:
            raise ConfigError(str(exc)) from exc
    return config


def _store_directory(url: str) -> Path | None:
    parts = urlsplit(url)
    return _real(Path(unquote(parts.path))) if parts.scheme == "file" else None


def _make_backing(backing: Path) -> None:
    try:
        backing.mkdir(mode=0o700, parents=True, exist_ok=True)
        if backing.stat().st_uid == os.geteuid():
            backing.chmod(0o700)
    except OSError as exc:
        raise PrimaryIOError(f"cannot make the backing directory {backing}: {exc.strerror}") from exc
    probe_xattrs(backing)


def _tell_of_other_host(config: Config) -> None:
    """Its daemon may well end before the first one here begins, which looks for itself."""
    from vmfs_stub.services.datastore_lock import served_elsewhere

    try:
        mark = served_elsewhere(config.private_dir)
    except OSError:
        return
    if mark is not None:
        warn(f"warning: {config.datastore.backing} is, or was, served by {mark}: a mount here waits until it is not")


def probe_xattrs(backing: Path) -> None:
    """Prove that trusted.* attributes can be set on files of ``backing``; raises Unsupported, PrimaryIOError."""
    try:
        with tempfile.TemporaryFile(dir=backing) as file:
            os.setxattr(file.fileno(), f"{XATTR_PREFIX}probe", b"1")
    except OSError as exc:
        if exc.errno in (errno.EOPNOTSUPP, errno.EPERM):
            raise Unsupported(
                f"files in {backing} cannot have trusted.* attributes ({exc.strerror}): be root (CAP_SYS_ADMIN), and "
                "use a filesystem that has them, such as ext4, XFS or Btrfs"
            ) from exc
        raise PrimaryIOError(f"cannot make files in the backing directory {backing}: {exc.strerror}") from exc


def _check_mountpoint(mountpoint: Path) -> None:
    if mounts_at(mountpoint):
        raise AlreadyExists(f"something is mounted on {mountpoint} already: unmount it, or use another directory")
    try:
        with os.scandir(mountpoint) as entries:
            if any(True for _ in entries):
                raise AlreadyExists(
                    f"the mountpoint {mountpoint} is not empty: the mount would hide what is in it; use an empty one"
                )
    except FileNotFoundError:
        return
    except OSError as exc:
        raise PrimaryIOError(f"the mountpoint {mountpoint} cannot be used: {exc.strerror}; use another one") from exc


def _check_store_parent(url: str, backing: Path) -> None:
    """What a store lies in is made only with the backing directory that lies there too: it may be a missing mount."""
    directory = _store_directory(url)
    if directory is not None and not (directory.parent.is_dir() or backing.is_relative_to(directory.parent)):
        raise ConfigError(
            f"the store {url} cannot be made: its parent directory does not exist; make it, or mount what belongs there"
        )


def _make_mountpoint(mountpoint: Path) -> None:
    try:
        mountpoint.mkdir(mode=0o755, parents=True, exist_ok=True)
    except OSError as exc:
        raise PrimaryIOError(f"cannot make the mountpoint {mountpoint}: {exc.strerror}") from exc
    try:
        make_immutable(mountpoint)
    except OSError as exc:
        warn(
            f"warning: the mountpoint {mountpoint} cannot be made immutable ({exc.strerror}): while it is not mounted, "
            "root can write into it"
        )
    else:
        say(f"{mountpoint} is immutable now: nothing can be written there while it is not mounted (see chattr(1))")


def _join_store(objects: ObjectStore, config: Config, *, encrypt: bool) -> Store:
    from vmfs_stub.store.key_sources import source_of
    from vmfs_stub.store.keyring import look_at
    from vmfs_stub.store.probe import probe
    from vmfs_stub.store.store import Store

    settings, url, needed = config.store, config.store.url, _store_needed(config)
    try:
        seen = look_at(objects)
    except ObjectMissing as exc:
        if needed is not None:
            raise _needs_another(config, needed, "where no store is") from exc
        if not encrypt and source_of(settings) is not None:
            raise ConfigError(
                f"there is no store at {url} that the key could open; --encrypt makes an encrypted one"
            ) from exc
        probe(objects)
        source = key_to_be(key_file=settings.key_file, passphrase_file=settings.passphrase_file)
        store = Store.open_or_create(objects, source=source)
        say(f"made the {'encrypted ' if store.key else ''}store {store.id} at {url}")
    else:
        if needed not in (None, seen.description.store_id):
            raise _needs_another(config, needed, f"where store {seen.description.store_id} is")
        store = Store(objects, seen.description, seen.unlock(source_of(settings)))
        probe(objects)
        say(f"joined the store {store.id} at {url}")
    return store


def _join_replica(store: Store, objects: ObjectStore, url: str) -> None:
    from vmfs_stub.store.replica import make_replica

    made = make_replica(store, objects)
    say(f"made the replica at {url}" if made else f"joined the replica at {url}")


def _store_needed(config: Config) -> str | None:
    """The store that placeholders need which are here already, of a datastore that was moved, say; None if none do."""
    from vmfs_stub.store.keyring import decode_seen

    try:
        if not has_maps(config):
            return None
        return decode_seen(config.store_copy_path.read_bytes()).description.store_id
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise PrimaryIOError(f"cannot look into {config.private_dir}: {exc.strerror}") from exc
    except (CorruptStoreObject, UnknownFormat):
        return None  # the daemon compares each placeholder


def _needs_another(config: Config, store_id: str | None, what: str) -> WrongStore:
    return WrongStore(
        f"there are placeholders in {config.datastore.backing} whose bytes are in store {store_id}, and --store "
        f"{config.store.url} is {what}: name the store that has them"
    )


def _make_parent(target: Path) -> None:
    """Before the store is made: its key file may be to lie beside the configuration."""
    try:
        target.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    except OSError as exc:
        raise ConfigError(f"cannot make the directory of {target}: {exc.strerror}") from exc


def _write_new(target: Path, text: str) -> None:
    try:
        fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError as exc:
        raise AlreadyExists(f"{target} exists already; it was not changed") from exc
    except OSError as exc:
        raise ConfigError(f"cannot write {target}: {exc.strerror}") from exc
    with os.fdopen(fd, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
