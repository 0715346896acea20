# Finds ExecuTorch in Python's package `executorch`; defines the target ExecutorchWheel::ExecutorchWheel.
#
# The package has the runtime as an extension module of Python, `_portable_lib`, which needs libpython and libtorch. So a
# program that is linked with it is for trying and testing; one to ship takes ExecuTorch's build from source.
find_package(Python3 REQUIRED COMPONENTS Interpreter Development.Embed)
find_package(Libtorch REQUIRED)
set(EXECUTORCH_ROOT "" CACHE PATH "The folder of Python's package executorch")
if(NOT EXECUTORCH_ROOT)
    execute_process(
        COMMAND "${Python3_EXECUTABLE}" -c
                "import importlib.util as u; s = u.find_spec('executorch'); print(list(s.submodule_search_locations)[0] if s else '')"
        OUTPUT_VARIABLE ExecutorchWheel_ROOT OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
else()
    set(ExecutorchWheel_ROOT "${EXECUTORCH_ROOT}")
endif()
file(GLOB ExecutorchWheel_RUNTIME "${ExecutorchWheel_ROOT}/extension/pybindings/_portable_lib*.so")
file(GLOB ExecutorchWheel_OPERATORS "${ExecutorchWheel_ROOT}/extension/llm/custom_ops/*custom_ops_aot_lib*.so"
     "${ExecutorchWheel_ROOT}/kernels/quantized/*quantized_ops_aot_lib*.so")
find_path(ExecutorchWheel_INCLUDE_DIR executorch/runtime/executor/program.h HINTS "${ExecutorchWheel_ROOT}/include")
include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(ExecutorchWheel REQUIRED_VARS ExecutorchWheel_RUNTIME ExecutorchWheel_OPERATORS
                                  ExecutorchWheel_INCLUDE_DIR
    REASON_FAILURE_MESSAGE "EXECUTORCH_ROOT names Python's package executorch, TORCHCHAT_EXECUTORCH=OFF does without")
if(ExecutorchWheel_FOUND AND NOT TARGET ExecutorchWheel::ExecutorchWheel)
    add_library(ExecutorchWheel::ExecutorchWheel INTERFACE IMPORTED)
    set_target_properties(
        ExecutorchWheel::ExecutorchWheel
        PROPERTIES INTERFACE_INCLUDE_DIRECTORIES
                   "${ExecutorchWheel_INCLUDE_DIR};${ExecutorchWheel_INCLUDE_DIR}/executorch/runtime/core/portable_type/c10"
                   INTERFACE_COMPILE_DEFINITIONS C10_USING_CUSTOM_GENERATED_MACROS
                   # The operators register themselves when they are loaded; nothing else refers to them.
                   INTERFACE_LINK_LIBRARIES
                   "-Wl,--no-as-needed;${ExecutorchWheel_RUNTIME};${ExecutorchWheel_OPERATORS};Python3::Python;-Wl,--as-needed;Libtorch::Libtorch")
endif()
mark_as_advanced(ExecutorchWheel_INCLUDE_DIR)
