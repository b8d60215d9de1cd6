# Sourced by every launcher (POSIX sh). It sets ROOT (the repository) and offers:
#   setup_venv REQUIREMENTS    make or reuse $ROOT/.venv and install the requirements file; sets PY
#   choose_python              the active environment, otherwise .venv (made when missing); sets PY
#   run MODULE [ARG...]        one process
#   launch MODULE [ARG...]     one process, or one for each GPU, on one or several nodes
#
# Variables read from outside:
#   PYTHON            interpreter from which .venv is made, for example PYTHON=python3.12
#   NPROC             processes on this machine (default: the number of visible GPUs, at least 1)
#   HOSTFILE          DeepSpeed host file ("name slots=8" a line): train on all of its nodes
#   DEEPSPEED_CONFIG  used as soon as there are several processes (default: scripts/zero2.json)
#   MED3DVLM_DRY_RUN  set to 1: print the command, one argument a line, instead of running it (not for the quickstart)

ROOT=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd -P)

export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
export GRADIO_ANALYTICS_ENABLED="${GRADIO_ANALYTICS_ENABLED:-False}"

say() { printf '%s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }

# --- the interpreter and .venv ---------------------------------------------------------------------------------------

# Prints "3.11" and the like; fails when $1 is no working Python.
python_version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

is_supported() { case $1 in 3.11 | 3.12 | 3.13) true ;; *) false ;; esac; }

# Sets BASE (an interpreter of a supported version) and BASE_VERSION.
find_base_python() {
    if [ -n "${PYTHON:-}" ]; then
        BASE=$PYTHON
        BASE_VERSION=$(python_version "$BASE") || die "PYTHON=$PYTHON does not start."
        is_supported "$BASE_VERSION" || die "PYTHON=$PYTHON is Python $BASE_VERSION; 3.11, 3.12 or 3.13 is needed."
        return
    fi
    for BASE in python3.11 python3.12 python3.13 python3 python; do
        BASE_VERSION=$(python_version "$BASE") && is_supported "$BASE_VERSION" && return
    done
    die "no Python 3.11, 3.12 or 3.13 on PATH. Install one, or name it: PYTHON=/path/to/python3.12 sh $0"
}

# One message for everything that pip cannot bring; only a missing venv module stops us.
report_system_packages() {
    missing='' notes=''
    if ! "$BASE" -c 'import ensurepip, venv' 2>/dev/null; then
        missing="python$BASE_VERSION-venv" notes="
  python$BASE_VERSION-venv: needed to make .venv"
    fi
    if ! command -v g++ >/dev/null 2>&1; then
        missing="$missing g++" notes="$notes
  g++: for DeepSpeed on CPU, and for the faster kernels of the encoder there"
    fi
    if [ ! -e /usr/share/wordnet/data.noun ]; then
        missing="$missing wordnet-base wordnet-sense-index" notes="$notes
  wordnet-base, wordnet-sense-index: only for the METEOR metric"
    fi
    [ -n "$missing" ] || return 0
    sudo='sudo '
    [ "$(id -u)" -ne 0 ] || sudo=''
    say "System packages that pip cannot install are missing:$notes
On Debian or Ubuntu: ${sudo}apt-get update && ${sudo}apt-get install -y ${missing# }"
    case $missing in *-venv*) exit 1 ;; esac
}

# Makes .venv when it is missing, was interrupted while being made, or has another version than PYTHON asks for.
make_venv() {
    venv_version=$(python_version "$ROOT/.venv/bin/python") || venv_version=none
    if [ "$venv_version" != none ] && "$ROOT/.venv/bin/python" -m pip --version >/dev/null 2>&1; then
        if [ -z "${PYTHON:-}" ]; then
            is_supported "$venv_version" && return
        else
            find_base_python
            [ "$BASE_VERSION" != "$venv_version" ] || return 0
        fi
        say ".venv has Python $venv_version: it is made again."
    fi
    find_base_python
    report_system_packages
    say "Making .venv with $BASE (Python $BASE_VERSION) ..."
    "$BASE" -m venv --clear "$ROOT/.venv"
}

# What a finished installation of file $1 leaves in its stamp: change the file or the interpreter, and it differs.
stamp_of() { printf '%s %s\n' "$(cksum <"$1")" "$("$PY" -V)"; }

setup_venv() {
    make_venv
    PY=$ROOT/.venv/bin/python
    export PATH="$ROOT/.venv/bin:$PATH" # ninja, which DeepSpeed looks for
    stamp=$ROOT/.venv/.installed-$1
    wanted=$(stamp_of "$ROOT/$1")
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        rm -f "$stamp" # an interrupted installation is not a finished one
        say "Installing $1 into .venv (once; a few minutes, about 2 GB on a CPU machine) ..."
        "$PY" -m pip install --quiet --disable-pip-version-check -r "$ROOT/$1" ||
            die "pip could not install $1. Run the command again to go on."
        printf '%s\n' "$wanted" >"$stamp"
    fi
    tune_cpu
}

choose_python() {
    if [ -n "${VIRTUAL_ENV:-}" ]; then
        PY=$VIRTUAL_ENV/bin/python
    elif [ -n "${CONDA_PREFIX:-}" ] && [ "${CONDA_DEFAULT_ENV:-base}" != base ]; then
        PY=$CONDA_PREFIX/bin/python
    elif [ -n "${MED3DVLM_DRY_RUN:-}" ]; then
        PY=$ROOT/.venv/bin/python
    elif [ "$(gpu_count)" -gt 0 ]; then
        setup_venv requirements.txt
    else
        setup_venv requirements-cpu.txt
    fi
    PATH="$(dirname -- "$PY"):$PATH"
    export PATH
    tune_cpu
}

# --- devices and processes -------------------------------------------------------------------------------------------

gpu_count() {
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        printf '%s\n' "$CUDA_VISIBLE_DEVICES" | tr ',' '\n' | grep -c '[0-9]' || true
    elif command -v nvidia-smi >/dev/null 2>&1; then
        nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true
    else
        echo 0
    fi
}

# glibc returns buffers of 32 MiB and more to the kernel and faults them in again; keeping them makes the encoder
# about twice as fast on CPU. Without effect, and so left alone, on a GPU.
tune_cpu() {
    [ "$(gpu_count)" -gt 0 ] || export GLIBC_TUNABLES="${GLIBC_TUNABLES:-\
glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=8000000000}"
}

execute() {
    if [ -n "${MED3DVLM_DRY_RUN:-}" ]; then
        printf '%s\n' "$@"
    else
        exec "$@"
    fi
}

run() {
    choose_python
    module=$1
    shift
    execute "$PY" -m "$module" "$@"
}

# Several nodes: HOSTFILE (DeepSpeed starts the others by ssh), or NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT set
# on each node, as scripts/slurm/*.sbatch do.
launch() {
    choose_python
    module=$1
    shift
    gpus=$(gpu_count)
    processes=${NPROC:-$gpus}
    [ "$processes" -gt 0 ] || processes=1
    config=${DEEPSPEED_CONFIG:-$ROOT/scripts/zero2.json}
    if [ "$gpus" -eq 0 ] && [ "$((processes * ${NNODES:-1}))" -gt 1 ]; then
        set -- --use_cpu True "$@" # the Trainer wants to be told before it takes DeepSpeed on CPU
        export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(((processes - 1 + $(getconf _NPROCESSORS_ONLN)) / processes))}"
    fi
    if [ -n "${HOSTFILE:-}" ]; then
        execute "$PY" -m deepspeed.launcher.runner --hostfile "$HOSTFILE" --module "$module" --deepspeed "$config" "$@"
    elif [ "${NNODES:-1}" -gt 1 ]; then
        execute "$PY" -m torch.distributed.run --nnodes "$NNODES" --node_rank "$NODE_RANK" \
            --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" --nproc_per_node "$processes" \
            -m "$module" --deepspeed "$config" "$@"
    elif [ "$processes" -gt 1 ]; then
        execute "$PY" -m torch.distributed.run --standalone --nproc_per_node "$processes" \
            -m "$module" --deepspeed "$config" "$@"
    else
        if [ "$gpus" -gt 1 ]; then # NPROC=1: a second visible GPU would make the Trainer fall back to DataParallel
            CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}
            export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES%%,*}"
        fi
        execute "$PY" -m "$module" "$@"
    fi
}
