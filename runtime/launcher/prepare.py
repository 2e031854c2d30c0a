"""From options and facts to a plan: which hosts, which job, what its workers run.

The launcher reads the files that `needed_files` names, looks around (`Facts`), and calls `prepare`.
Everything that can be wrong with a launch is found here, before any worker starts. Where other hosts have a
part, they are dialled before (`hosts_from_options`, `dial_settings`): what they have is a fact, too.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from runtime.config import Config
from runtime.errors import ConfigError
from runtime.job import ENV_NAME, IDENTITY_ENV, Entry, JobSpec, Restart, RoleSpec, raise_together
from runtime.job_toml import job_from_toml
from runtime.launcher import slurm
from runtime.launcher.entries import Sources, check_entry, find_preload
from runtime.launcher.hosts import mark_local, parse_hostfile, parse_hosts, select_hosts
from runtime.launcher.options import LaunchOptions
from runtime.launcher.plan import Facts, Host, Plan, make_plan
from runtime.launcher.tunables import READ_AT_START

if TYPE_CHECKING:
    from runtime.launcher.ssh import DialSettings


def needed_files(options: LaunchOptions) -> tuple[str, ...]:
    """The files whose text `prepare` wants in `Facts.files`."""
    hostfile = options.hostfile if options.hosts is None else None
    return tuple(path for path in (options.job_file, hostfile, *options.env_files) if path)


def prepare(options: LaunchOptions, facts: Facts, sources: Sources | None = None) -> Plan:
    """The plan of a launch. With `sources`, entries are looked up, and what to preload is found.

    Raises `ConfigError`.
    """
    hosts = hosts_from_options(options, facts)
    job = job_from_options(options, hosts, facts)
    plan = make_plan(options, hosts, job, facts=facts)
    if sources is None:
        return plan
    return replace(plan, job=_looked_up(plan.job, facts, sources))


def hosts_from_options(options: LaunchOptions, facts: Facts) -> tuple[Host, ...]:
    """The hosts that `--hosts` names, else the host file, else Slurm's allocation, else this machine.

    Slots stay None where only the host itself can say them and has not been asked yet (`Facts.found`).
    """
    in_slurm = slurm.is_meant(options, facts.env)
    if in_slurm:
        hosts = slurm.allocated(options, facts.env)
    elif options.hosts is not None:
        hosts = parse_hosts(options.hosts)
    elif options.hostfile is not None:
        hosts = parse_hostfile(facts.files[options.hostfile], options.hostfile)
    else:
        hosts = (Host("localhost"),)
    hosts = select_hosts(hosts, options.include, options.exclude)
    hosts = mark_local(hosts, facts.own_names)
    if options.job_file is not None and len(hosts) > 1:
        hosts = hosts[: job_from_toml(facts.files[options.job_file], options.job_file).node_num]
    if options.launcher == "ssh" or (in_slurm and slurm.is_confined(facts.env)):
        hosts = tuple(replace(host, local=False) for host in hosts)
    remote = [host.name for host in hosts if not host.local]
    if remote and options.launcher == "local":
        names = ", ".join(remote)
        raise ConfigError(f"--launcher local: this machine only, and it is not {names}")
    return hosts if options.job_file is not None else _used(options, hosts, facts)


def _used(options: LaunchOptions, hosts: tuple[Host, ...], facts: Facts) -> tuple[Host, ...]:
    """Of the hosts, those that the one role of a command line uses; their slots filled in."""
    low, high = options.nnodes or (1, len(hosts))
    if low > len(hosts):
        names = ", ".join(host.name for host in hosts)
        raise ConfigError(
            f"--nnodes {low}: found {len(hosts)} host{'s' if len(hosts) > 1 else ''} ({names}); name "
            "them with --hosts or --hostfile (starting by hand on every node is not possible yet)"
        )
    used = hosts[:high]
    if options.standalone and len(used) > 1:
        raise ConfigError(f"--standalone: is one host, but {len(used)} are named")
    if any(_on_host(options, host, facts) is None for host in used):
        return used
    counts = _counts(options, used, facts)
    return tuple(
        replace(host, slots=host.slots or count)
        for host, count in zip(used, counts, strict=True)
        if count
    )


def dial_settings(
    options: LaunchOptions, hosts: Sequence[Host], facts: Facts, config: Config
) -> DialSettings:
    """How the other hosts are reached, and what the job needs there.

    ssh gives a silent line up when an agent would be, too: not before.
    """
    from runtime.launcher.ssh import DialSettings, forwarded  # most launches have one host

    if options.job_file is not None:
        roles = list(job_from_toml(facts.files[options.job_file], options.job_file).roles.values())
        runs = [(role.entry, role.workdir, role.python) for role in roles]
    else:
        assert options.entry is not None  # else refused when the options were parsed
        runs = [(options.entry, None, None)]
    paths = []
    for entry, workdir, _ in runs:
        folder = options.workdir or workdir or ""
        paths += [folder] if folder else []
        paths += [os.path.join(folder, entry.target)] if entry.form == "script" else []
    return DialSettings(
        python=options.python or facts.python,
        workdir=facts.cwd,
        pythons=tuple(python for _, _, python in runs if python and not options.python),
        paths=tuple(dict.fromkeys(paths)),
        carrier="srun" if slurm.carries(options, hosts, facts.env) else "ssh",
        ssh_port=options.ssh_port,
        ssh_config=options.ssh_config,
        ssh_args=options.ssh_args,
        env=tuple(
            item for item in forwarded(facts.env).items() if item[0].startswith(READ_AT_START)
        ),
        timeout_s=options.connect_timeout,
        alive_interval_s=max(1, math.ceil(config.coordinator.heartbeat_timeout_ms / 3000)),
    )


def job_from_options(options: LaunchOptions, hosts: tuple[Host, ...], facts: Facts) -> JobSpec:
    """The job of `--job`, or one elastic role that runs the program. The command line beats the file."""
    if options.job_file is not None:
        job = job_from_toml(facts.files[options.job_file], options.job_file)
    else:
        assert options.entry is not None  # else refused when the options were parsed
        role = _role_from_options(options, options.entry, hosts, facts)
        kind: Literal["CPU", "GPU"] = "GPU" if facts.gpu_count else "CPU"
        job = JobSpec(role.name, {role.name: role}, device_type=kind)
    env = dict(job.global_env)
    for path in options.env_files:
        env |= parse_env_file(facts.files[path], path)
    roles = {name: _overridden(role, options) for name, role in job.roles.items()}
    return replace(job, roles=roles, global_env={**env, **options.env})


def _overridden(role: RoleSpec, options: LaunchOptions) -> RoleSpec:
    return replace(
        role,
        python=options.python or role.python,
        workdir=options.workdir or role.workdir,
        preload=role.preload if options.preload is None else options.preload,
        start_method=options.start_method or role.start_method,
    )


def _role_from_options(
    options: LaunchOptions, entry: Entry, hosts: tuple[Host, ...], facts: Facts
) -> RoleSpec:
    counts = _counts(options, hosts, facts)
    low = options.nnodes[0] if options.nnodes else len(hosts)
    return RoleSpec(
        name=options.role,
        kind="elastic",
        entry=entry,
        total=sum(counts),
        restart=Restart("gang", options.max_restarts),
        nnodes=(min(low, len(hosts)), len(hosts)),
        nproc_per_node=counts[0] if len(set(counts)) == 1 else None,
        init_process_group=options.init_process_group,
    )


def _named(options: LaunchOptions) -> bool:
    return options.hosts is not None or options.hostfile is not None


def _counts(options: LaunchOptions, hosts: tuple[Host, ...], facts: Facts) -> list[int]:
    """How many workers each host gets."""
    total, nproc = options.total, options.nproc_per_node
    if isinstance(nproc, int) and total is not None and total % nproc:
        raise ConfigError(f"-n {total}: must be a multiple of --nproc-per-node {nproc}")
    if total is None:
        return [_known(options, host, facts) for host in hosts]
    if nproc is None and any(host.slots is None for host in hosts):
        share, left = divmod(total, len(hosts))
        counts = [share + (number < left) for number in range(len(hosts))]
    else:
        counts, left = [], total
        for host in hosts:
            counts.append(min(left, _known(options, host, facts)))
            left -= counts[-1]
        if left:
            room = ", ".join(f"{h.name} {n}" for h, n in zip(hosts, counts, strict=True))
            raise ConfigError(f"-n {total}: there is room for {total - left} workers ({room})")
    return counts


def _known(options: LaunchOptions, host: Host, facts: Facts) -> int:
    count = _on_host(options, host, facts)
    if count is not None:
        return count
    if options.nproc_per_node is None:
        return 1  # a dry run asks nobody
    raise ConfigError(
        f"--nproc-per-node {options.nproc_per_node}: what host {host.name} has is not known; "
        "say its slots"
    )


def _on_host(options: LaunchOptions, host: Host, facts: Facts) -> int | None:
    """`--nproc-per-node` on one host. None: the host must be asked first."""
    wanted = options.nproc_per_node
    if isinstance(wanted, int):
        if host.slots is not None and wanted > host.slots:
            raise ConfigError(
                f"--nproc-per-node {wanted}: host {host.name} has {host.slots} "
                f"slot{'s' if host.slots > 1 else ''}"
            )
        return wanted
    if host.slots is not None:
        return host.slots
    if not host.local and host.name not in facts.found:
        return None
    cpus, gpus = facts.found.get(host.name, (facts.cpu_count, facts.gpu_count))
    if wanted is None:
        return gpus or 1 if _named(options) else 1
    if wanted == "gpu" and not gpus:
        where = "this machine" if host.local else f"host {host.name}"
        raise ConfigError(f"--nproc-per-node gpu: {where} has no GPU (allowed: N, cpu, auto)")
    return cpus if wanted == "cpu" else gpus or cpus


def parse_env_file(text: str, source: str) -> dict[str, str]:
    """Read NAME=VALUE lines: `export` before the name, quotes around the value and # comments allowed.

    Raises one `ConfigError` naming each wrong line.
    """
    env: dict[str, str] = {}
    problems: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip().removeprefix("export ").strip()
        if not stripped or stripped.startswith("#"):
            continue
        name, equals, value = stripped.partition("=")
        name = name.rstrip()
        if not equals or not ENV_NAME.fullmatch(name):
            problems.append(f"{source}:{number}: must be NAME=VALUE, not {line.strip()!r}")
        elif name in IDENTITY_ENV:
            problems.append(
                f"{source}:{number}: {name} is set by the launcher and cannot be chosen"
            )
        else:
            env[name] = _unquoted(value.strip())
    raise_together(problems)
    return env


def _unquoted(value: str) -> str:
    if quoted := re.fullmatch(r"""(["'])(.*?)\1(\s+#.*)?""", value):
        return quoted[2]
    return value.partition(" #")[0].rstrip()


def _looked_up(job: JobSpec, facts: Facts, sources: Sources) -> JobSpec:
    """The job with each role's preload filled in, if all of its entries can be found."""
    problems: list[str] = []
    roles: dict[str, RoleSpec] = {}
    for name, role in job.roles.items():
        here = sources.at(role.workdir or facts.cwd)
        if not here.has_directory():
            problems.append(f"role {name}: workdir {role.workdir}: no such directory")
            continue
        # Another interpreter has another path: what it can import is not known here.
        if role.python is None:
            problems += [f"role {name}: {line}" for line in check_entry(role.entry, here)]
        roles[name] = role
        if role.preload is None:
            roles[name] = replace(role, preload=find_preload(role, here))
    raise_together(problems)
    return replace(job, roles=roles)
