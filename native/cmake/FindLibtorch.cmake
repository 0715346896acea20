# Finds libtorch, in Python's package `torch` or a libtorch folder; defines the target Libtorch::Libtorch.
#
# TORCH_ROOT names the folder that holds include/ and lib/; without it, CMAKE_PREFIX_PATH is searched, and then the
# `torch` of the Python that is found. PyTorch's own TorchConfig.cmake is not used: it looks for CUDA and MKL
# toolkits, which linking against the built libraries does not need.
set(Libtorch_HEADER torch/csrc/inductor/aoti_runner/model_container_runner_cpu.h)
set(TORCH_ROOT "" CACHE PATH "The folder of libtorch, or of Python's package torch")
if(NOT TORCH_ROOT)
    find_package(Python3 QUIET COMPONENTS Interpreter)
    if(Python3_FOUND)
        execute_process(
            COMMAND "${Python3_EXECUTABLE}" -c
                    "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"
            OUTPUT_VARIABLE Libtorch_PYTHON_ROOT OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    endif()
endif()
find_path(Libtorch_INCLUDE_DIR ${Libtorch_HEADER} HINTS "${TORCH_ROOT}" "${Libtorch_PYTHON_ROOT}"
          PATH_SUFFIXES include)
set(Libtorch_LIBRARIES_FOUND "")
foreach(Libtorch_NAME torch_cpu c10)
    find_library(Libtorch_${Libtorch_NAME}_LIBRARY ${Libtorch_NAME} HINTS "${Libtorch_INCLUDE_DIR}/../lib"
                 "${TORCH_ROOT}" PATH_SUFFIXES lib)
    list(APPEND Libtorch_LIBRARIES_FOUND "${Libtorch_${Libtorch_NAME}_LIBRARY}")
    mark_as_advanced(Libtorch_${Libtorch_NAME}_LIBRARY)
endforeach()
if(EXISTS "${Libtorch_INCLUDE_DIR}/torch/headeronly/version.h")
    foreach(Libtorch_PART MAJOR MINOR PATCH)
        file(STRINGS "${Libtorch_INCLUDE_DIR}/torch/headeronly/version.h" Libtorch_LINE
             REGEX "define TORCH_VERSION_${Libtorch_PART} ")
        string(REGEX MATCH "[0-9]+" Libtorch_${Libtorch_PART} "${Libtorch_LINE}")
    endforeach()
    set(Libtorch_VERSION "${Libtorch_MAJOR}.${Libtorch_MINOR}.${Libtorch_PATCH}")
endif()
include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(Libtorch REQUIRED_VARS Libtorch_torch_cpu_LIBRARY Libtorch_c10_LIBRARY
                                  Libtorch_INCLUDE_DIR VERSION_VAR Libtorch_VERSION
    REASON_FAILURE_MESSAGE "TORCH_ROOT names a libtorch folder or Python's package torch, TORCHCHAT_AOTI=OFF does without")
if(Libtorch_FOUND AND NOT TARGET Libtorch::Libtorch)
    add_library(Libtorch::Libtorch INTERFACE IMPORTED)
    set_target_properties(Libtorch::Libtorch PROPERTIES INTERFACE_INCLUDE_DIRECTORIES "${Libtorch_INCLUDE_DIR}"
                          INTERFACE_LINK_LIBRARIES "${Libtorch_LIBRARIES_FOUND}")
endif()
mark_as_advanced(Libtorch_INCLUDE_DIR)
