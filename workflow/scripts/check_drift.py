"""Do dvc.yaml and the Snakefile describe the same work? One line per difference, and exit code 1 if there is one."""

import os
import re
import subprocess
import sys

from dvc.repo import Repo
from stages import ALLOWED, ROOT, asks, rule_files, rule_modules

from swconv.fingerprint import closure, csrc_files

# Their outputs belong to the machine: no stage keeps them.
MACHINE = {"build", "track"}


def snakemake_files() -> dict[str, tuple[str, set[str]]]:
    """Rule and inputs of every output behind the default target."""
    command = [sys.executable, "-m", "snakemake", "--dry-run", "--forceall", "--nolock"]
    listing = subprocess.run(command, check=True, capture_output=True, text=True)
    jobs = re.findall(r"^rule (\w+):\n(?:    input: (.*)\n)?    output: (.*)$", listing.stderr + listing.stdout, re.MULTILINE)
    return {output.removesuffix(" (update)"): (rule, set(inputs.split(", ")) - {""})
            for rule, inputs, made in jobs for output in made.split(", ")}


def code(rules: list[str]) -> set[str]:
    """Source files that these rules depend on, and the files that hold them: Snakemake compares their shell text."""
    modules, holders = rule_modules(), rule_files()
    files = {holders[rule] for rule in rules}
    for module, csrc in (modules[rule] for rule in rules if rule in modules):
        files |= {*closure(module).values(), *(csrc_files() if csrc else ())}
    return {path.relative_to(ROOT).as_posix() for path in files}


def covers(folder: str, path: str) -> bool:
    return path == folder or path.startswith(f"{folder}/")


def differences() -> list[str]:
    found, files = [], snakemake_files()
    made_here = {path for path, (rule, _) in files.items() if rule in MACHINE}
    owner: dict[str, str] = {}
    for stage in Repo().index.stages:
        name, rules = stage.addressing, ALLOWED[asks(stage.cmd)[0]]
        deps = {os.path.relpath(dep.fs_path) for dep in stage.deps}
        outs = {os.path.relpath(out.fs_path) for out in stage.outs}
        own = {path for path in files if any(covers(out, path) for out in outs)}
        owner |= dict.fromkeys(own, name)
        needs = set().union(*(files[path][1] for path in own)) - own - made_here
        found += [f"{out}: stage {name} of dvc.yaml, no rule makes it" for out in outs if not any(covers(out, p) for p in own)]
        found += [f"{path}: made by rule {files[path][0]}, which stage {name} does not allow"
                  for path in own if files[path][0] not in set(rules) - MACHINE]
        found += [f"{path}: read for stage {name}, missing among its deps"
                  for path in needs | code(rules) if not any(covers(dep, path) for dep in deps)]
        found += [f"{dep}: a dep of stage {name}, nothing there reads it"
                  for dep in deps if covers("artifacts", dep) and not any(covers(dep, path) for path in needs)]
    found += [f"{path}: made by rule {rule}, in no stage of dvc.yaml"
              for path, (rule, _) in files.items() if rule not in MACHINE and path not in owner]
    return sorted(found)


def main() -> None:
    found = differences()
    print("\n".join(found) or "dvc.yaml and the Snakefile agree")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
