// What is wanted of ExecuTorch only where it comes out of Python's package.
#include <executorch/runtime/platform/platform.h>

// Python's bindings register a function that writes every message to standard error, when they are loaded. This module
// comes before them, so that they find this instead, and messages go to `et_pal_emit_log_message`.
bool executorch::runtime::register_pal(PalImpl) {
    return true;
}
