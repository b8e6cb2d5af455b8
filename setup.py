"""Build csrc/ into swconv/_C.abi3.so, and nothing else (pyproject.toml describes the package).

One ninja file compiles the C++ sources and, where nvcc is found, the CUDA sources; ninja skips what has not changed.
Beside the objects, in build/native, stay the settings of the build (settings.json) and nvcc's logs (*.ptxas.log).

Environment: CXX, the C++ compiler (g++); CUDA_HOME, the folder of the CUDA toolkit (that of nvcc on the PATH);
SWCONV_CUDA=0 leaves CUDA out.
"""

import importlib.util
import json
import logging
import os
import platform
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BUILD = Path("build/native")  # relative to ROOT, where every command runs: the library does not depend on the clone's place
ARCHITECTURES = {
    "sm_80": "arch=compute_80,code=sm_80",
    "sm_89": "arch=compute_89,code=sm_89",
    "sm_90": "arch=compute_90,code=sm_90",
    "compute_90": "arch=compute_90,code=compute_90",
}
CXX_SOURCES = ["csrc/shift_add_cpu.cpp", "csrc/binding.cpp"]
VECTOR_SOURCES = ["csrc/assemble_cpu.cpp", "csrc/strips_cpu.cpp"]  # compiled for every set of instructions; binding.cpp picks
SCARCE = "-fno-predictive-commoning"       # 16 registers are too few to carry taps from line to line
INSTRUCTIONS = {
    "portable": SCARCE,
    **({"avx2": f"-march=x86-64-v3 {SCARCE}", "avx512": "-march=x86-64-v4 -mprefer-vector-width=512"}
       if platform.machine() == "x86_64" else {}),
}
CUDA_SOURCES = ["csrc/shift_add.cu", "csrc/assemble.cu", "csrc/strips.cu"]
HEADERS = ["csrc/device.h", "csrc/lanes.h", "csrc/swconv.h"]

NINJA = """\
builddir = {build}
rule cxx
  command = {cxx} -MMD -MF $out.d {cxx_flags} $options -c $in -o $out
  description = {cxx} $in $options
  depfile = $out.d
  deps = gcc
rule nvcc
  command = {nvcc} -MD -MF $out.d {nvcc_flags} -c $in -o $out > $out.ptxas.log 2>&1 || (cat $out.ptxas.log; exit 1)
  description = nvcc $in
  depfile = $out.d
  deps = gcc
rule link
  command = {cxx} -shared -o $out $in {link_flags}
  description = link $out
"""


def tool_version(command, pattern):
    """First match of `pattern` in what `command --version` prints; None where the command does not run."""
    try:
        printed = subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    found = re.search(pattern, printed)
    return found.group(0).strip() if found else None


def torch_folder():
    """Where torch is installed, without importing it: the build needs its headers and the name of its library."""
    found = importlib.util.find_spec("torch")
    if found is None:
        raise SystemExit("Building swconv needs torch in this environment, and found none. Run pip install torch first, "
                         "and pip install with --no-build-isolation.")
    return Path(found.submodule_search_locations[0])


def cuda_object(source):
    return f"{Path(source).stem}_cuda.o"


def torch_version(folder):
    return re.search(r"__version__ = '([^']+)'", (folder / "version.py").read_text()).group(1)


def cuda_toolkit(nvcc):
    """The toolkit's folder, which a wrapper called nvcc on the PATH does not tell by its place."""
    if os.environ.get("CUDA_HOME"):
        return Path(os.environ["CUDA_HOME"])
    dry = subprocess.run([nvcc, "--dryrun", "-c", CUDA_SOURCES[0]], capture_output=True, text=True, cwd=ROOT).stderr
    found = re.search(r"_HERE_=(.+)/bin\s", dry)
    return Path(found.group(1)) if found else Path("/usr/local/cuda")


def find_cuda():
    """nvcc, toolkit folder and static runtime; or why the library is built without CUDA."""
    if os.environ.get("SWCONV_CUDA") == "0":
        return None, "SWCONV_CUDA=0"
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None, "no nvcc on the PATH"
    home = cuda_toolkit(nvcc)
    runtimes = [home / folder / "libcudart_static.a" for folder in ("lib64", "lib", "targets/x86_64-linux/lib")]
    runtime = next((path for path in runtimes if path.is_file()), None)
    if runtime is None:
        return None, f"{home} holds nvcc but no libcudart_static.a (set CUDA_HOME to a complete toolkit)"
    return {"nvcc": nvcc, "runtime": runtime}, None


class BuildNative(build_ext):
    """Write the ninja file, run it, put the library in its place."""

    def build_extension(self, ext):
        os.chdir(ROOT)
        BUILD.mkdir(parents=True, exist_ok=True)
        os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
        cuda, reason = find_cuda()
        if cuda is not None and not self.compiles(cuda):
            cuda, reason = None, f"the CUDA sources did not compile (see {BUILD}/*.ptxas.log)"
        if cuda is None:
            logging.warning("Building without CUDA: %s.", reason)
        self.write_ninja(cuda, reason)
        self.ninja("_C.abi3.so")
        self.place(Path(self.get_ext_fullpath(ext.name)))

    def compiles(self, cuda):
        self.write_ninja(cuda, None)
        return self.ninja(*map(cuda_object, CUDA_SOURCES), required=False)

    def write_ninja(self, cuda, reason):
        torch = torch_folder()
        cxx = os.environ.get("CXX", "g++")
        version = tool_version(cxx, r".+")
        if version is None:
            raise SystemExit(f"Building swconv needs a C++17 compiler, and could not run {cxx}. "
                             "Install g++, or set CXX to your compiler.")
        settings = {
            "compiler": {"command": cxx, "version": version},
            "nvcc": cuda and tool_version(cuda["nvcc"], r"V[\d.]+"),
            "architectures": list(ARCHITECTURES) if cuda else [],
            "without_cuda_because": reason,
            "torch": torch_version(torch),
        }
        self.write(BUILD / "settings.json", json.dumps(settings, indent=2) + "\n")
        flags = ["-std=c++17", "-O3", "-fPIC", "-Wall", "-Wno-psabi", f"-isystem {torch}/include",
                 f"-ffile-prefix-map={torch}=torch", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
        link = [f"-L{torch}/lib", "-ltorch_cpu"]
        objects = {BUILD / (Path(source).stem + ".o"): ("cxx", source, "") for source in CXX_SOURCES}
        objects |= {BUILD / f"{Path(source).stem}_{name}.o": ("cxx", source, f"-DSWCONV_CPU={name} {options}")
                    for source in VECTOR_SOURCES for name, options in INSTRUCTIONS.items()}
        if cuda:
            flags.append("-DSWCONV_CUDA")
            link += [str(cuda["runtime"]), "-ldl", "-lrt", "-lpthread"]
            objects |= {BUILD / cuda_object(source): ("nvcc", source, "") for source in CUDA_SOURCES}
        text = NINJA.format(
            cxx=cxx, cxx_flags=" ".join(flags), link_flags=" ".join(link), build=BUILD,
            nvcc=cuda["nvcc"] if cuda else "", nvcc_flags=" ".join(
                ["-std=c++17", "-O3", "-Xcompiler -fPIC", f"-ccbin {cxx}", "-Xptxas -v",
                 *(f"-gencode={code}" for code in ARCHITECTURES.values())]))
        text += "".join(f"build {out}: {rule} {source}\n  options = {options}\n"
                        for out, (rule, source, options) in objects.items())
        text += f"build {BUILD}/_C.abi3.so: link {' '.join(map(str, objects))}\n"
        self.write(BUILD / "build.ninja", text)

    def ninja(self, *targets, required=True):
        try:
            code = subprocess.call(["ninja", "-f", f"{BUILD}/build.ninja", *(f"{BUILD}/{target}" for target in targets)])
        except FileNotFoundError:
            raise SystemExit("Building swconv needs ninja, and found none on the PATH. Run pip install ninja.") from None
        if code and required:
            raise SystemExit(code)
        return code == 0

    def write(self, path, text):
        if not path.is_file() or path.read_text() != text:
            path.write_text(text)

    def place(self, target):
        """Replace the library at once and only when it changed: running processes keep the one they loaded."""
        built = (BUILD / "_C.abi3.so").read_bytes()
        if target.is_file() and target.read_bytes() == built:
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_suffix(".tmp")
        fresh.write_bytes(built)
        fresh.replace(target)

    def copy_extensions_to_source(self):
        for ext in self.extensions:
            self.place(ROOT / self.get_ext_filename(ext.name))


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("swconv._C", CXX_SOURCES + VECTOR_SOURCES + CUDA_SOURCES, depends=HEADERS, py_limited_api=True)],
        cmdclass={"build_ext": BuildNative},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
