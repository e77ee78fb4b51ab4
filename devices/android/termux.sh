#!/data/data/com.termux/files/usr/bin/sh
# edgesafe in Termux on an Android phone. In Termux:
#   sh termux.sh edgesafe-0.1.0-py3-none-any.whl BUNDLE
# `make wheel` in a clone makes the wheel. It installs Termux's own packages, because PyPI has none for Android; then the bundle
# is tested and measured on the phone. It can be run again at any time.
set -eu

fail() {
    echo "termux.sh: $1" >&2
    exit 1
}

[ $# = 2 ] || fail "two arguments are wanted: the wheel and the bundle's folder"
case "$1" in
*.whl) [ -f "$1" ] || fail "$1 is no file" ;;
*) fail "$1 is no wheel (.whl)" ;;
esac
[ -f "$2/manifest.json" ] || fail "$2 is no bundle: it has no manifest.json"
command -v pkg > /dev/null || fail "this is not Termux: it has no pkg"
[ "$(uname -m)" = aarch64 ] || fail "the phone is $(uname -m), and onnxruntime is for aarch64"

pkg install -y python python-pip python-numpy python-pillow python-onnxruntime
# tokenizers is built here, by Rust: a quarter of an hour, once. huggingface_hub, which it asks for, is never imported.
if ! python -c "import tokenizers" 2> /dev/null; then
    pkg install -y rust binutils
    pip install --no-deps tokenizers
fi
pip install --no-deps --force-reinstall "$1"
edgesafe smoke "$2"
edgesafe measure "$2"
echo "ready: edgesafe serve $2, then http://127.0.0.1:8765/ in the phone's browser"
