"""Do dvc.yaml and the Snakefile describe the same work? One line per difference, and exit code 1 if there is one."""

import os
import re
import subprocess
import sys

from dvc.repo import Repo
from stages import ALLOWED, ROOT, asks, params, rule_files, rule_modules, targets

from swconv.fingerprint import closure, csrc_files

# Their outputs belong to the machine: no stage keeps them.
MACHINE = {"build", "count", "track", "track_downstream"}
# Stages outside the default target.
APART = ("page", "figure", "downstream", "overfit")


def snakemake_files(pages: list[str]) -> dict[str, tuple[str, set[str], set[str]]]:
    """Rule, inputs and outputs of the job of every output behind the default target and these pages."""
    command = [sys.executable, "-m", "snakemake", "--dry-run", "--forceall", "--nolock", "all", *pages]
    listing = subprocess.run(command, check=True, capture_output=True, text=True)
    jobs = re.findall(r"^rule (\w+):\n(?:    input: (.*)\n)?    output: (.*)$", listing.stderr + listing.stdout, re.MULTILINE)
    split = [(rule, set(inputs.split(", ")) - {""}, set(made.replace(" (update)", "").split(", ")))
             for rule, inputs, made in jobs]
    return {output: job for job in split for output in job[2]}


def code(rules: list[str]) -> set[str]:
    """Source files that these rules depend on, and the files that hold them: Snakemake compares their shell text."""
    modules, holders = rule_modules(), rule_files()
    files = {holders[rule] for rule in rules}
    for module, csrc in (each for rule in rules for each in modules.get(rule, ())):
        files |= {*closure(module).values(), *(csrc_files() if csrc else ())}
    return {path.relative_to(ROOT).as_posix() for path in files}


def covers(folder: str, path: str) -> bool:
    return path == folder or path.startswith(f"{folder}/")


def behind(own: set[str], rules: list[str], files: dict[str, tuple[str, set[str], set[str]]]) -> set[str]:
    """A stage's own files, and what its rules make for them that no stage keeps."""
    found, pending = set(), set(own)
    while pending:
        found |= set().union(*(files[path][2] for path in pending))
        pending = {path for each in pending for path in files[each][1] if path in files and files[path][0] in rules} - found
    return found


def differences() -> list[str]:
    known, stages = params.load(ROOT / "params"), list(Repo().index.stages)
    asked = {stage.addressing: targets(known, *asks(stage.cmd)) for stage in stages}
    pages = sorted(path for stage in stages if asks(stage.cmd)[0] in APART for path in asked[stage.addressing])
    found, files = [], snakemake_files(pages)
    made_here = {path for path, (rule, *_) in files.items() if rule in MACHINE}
    owner: dict[str, str] = {}
    for stage in stages:
        name, rules = stage.addressing, ALLOWED[asks(stage.cmd)[0]]
        deps = {os.path.relpath(dep.fs_path) for dep in stage.deps}
        outs = {os.path.relpath(out.fs_path) for out in stage.outs}
        own = {path for path in files if any(covers(out, path) for out in outs)}
        made = behind(own, rules, files)
        owner |= dict.fromkeys(made, name)
        needs = set().union(*(files[path][1] for path in made)) - made - made_here
        found += [f"{out}: stage {name} of dvc.yaml, no rule makes it" for out in outs if not any(covers(out, p) for p in own)]
        found += [f"{path}: made by rule {files[path][0]}, which stage {name} does not allow"
                  for path in own if files[path][0] not in set(rules) - MACHINE]
        found += [f"{path}: read for stage {name}, missing among its deps"
                  for path in needs | code(rules) if not any(covers(dep, path) for dep in deps)]
        found += [f"{dep}: a dep of stage {name}, nothing there reads it"
                  for dep in deps if covers("artifacts", dep) and not any(covers(dep, path) for path in needs)]
    found += [f"{path}: made by rule {rule}, in no stage of dvc.yaml"
              for path, (rule, *_) in files.items() if rule not in MACHINE and path not in owner]
    kept = {path for paths in asked.values() for path in paths}
    of_rows = [f"{known.profile(known.active.profile).reports}/{report}.md" for report in known.reports]
    found += [f"{page}: a page of params/runs.yaml, in no dvc.yaml" for page in of_rows if page not in kept]
    return sorted(found)


def main() -> None:
    found = differences()
    print("\n".join(found) or "dvc.yaml and the Snakefile agree")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
