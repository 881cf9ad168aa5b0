"""What is changed in Horovod 0.28.1 before it is compiled; imports nothing."""

_LOST = (
    "what is submitted while Horovod's thread ends was never answered, and waited for without end"
)

_GIL = (
    "Horovod's thread frees tensors under a lock, for which torch needs the GIL, while the caller "
    "held the GIL and waited for the lock: a rank that lost another hung for ever"
)

# file, text as released, text that we build, reason
EDITS = [
    ("CMakeLists.txt", "CMAKE_CXX_STANDARD 14)", "CMAKE_CXX_STANDARD 20)", "torch's headers"),
    (
        "horovod/torch/CMakeLists.txt",
        "CMAKE_CXX_STANDARD 14)",
        "CMAKE_CXX_STANDARD 20)",
        "torch's headers",
    ),
    (
        "horovod/common/ops/cuda/CMakeLists.txt",
        "CMAKE_CUDA_STANDARD 11)",
        "CMAKE_CUDA_STANDARD 17)",
        "nvcc 13 no longer knows C++11",
    ),
    (
        "horovod/common/gloo/gloo_controller.cc",
        "global_ranks_.reserve(size_);",
        "global_ranks_.resize(size_);",
        "the vector stays empty, so the stall inspector never names a rank on Gloo",
    ),
    (
        "third_party/flatbuffers/include/flatbuffers/stl_emulation.h",
        "  const size_type count_;\n",
        "  size_type count_;\n",
        "GCC 14 and newer refuse the assignment to it, which nothing calls",
    ),
    *(
        (f"horovod/common/{name}", released, wanted, _LOST)
        for name, released, wanted in (
            (
                "tensor_queue.h",
                "  void FinalizeTensorQueue(const Status& status);\n",
                "  void FinalizeTensorQueue(const Status& status);\n  void Reopen();\n",
            ),
            (
                "tensor_queue.h",
                "  std::queue<Request> message_queue_;\n",
                "  std::queue<Request> message_queue_;\n\n  bool closed_ = false;\n",
            ),
            (
                "tensor_queue.cc",
                "  if (tensor_table_.find(e.tensor_name) != tensor_table_.end()) {\n",
                "  if (closed_) {\n    return SHUT_DOWN_ERROR;\n  }\n"
                "  if (tensor_table_.find(e.tensor_name) != tensor_table_.end()) {\n",
            ),
            (
                "tensor_queue.cc",
                "  for (std::size_t i = 0; i < entries.size(); ++i) {\n",
                "  if (closed_) {\n    return SHUT_DOWN_ERROR;\n  }\n"
                "  for (std::size_t i = 0; i < entries.size(); ++i) {\n",
            ),
            (
                "tensor_queue.cc",
                "  for (auto& e : tensor_table_) {\n",
                "  closed_ = true;\n  for (auto& e : tensor_table_) {\n",
            ),
            (
                "tensor_queue.cc",
                "// Execute callback for each tensor and clear tensor queue\n",
                "void TensorQueue::Reopen() {\n"
                "  std::lock_guard<std::mutex> guard(mutex_);\n  closed_ = false;\n}\n\n"
                "// Execute callback for each tensor and clear tensor queue\n",
            ),
            (
                "process_set.cc",
                '  LOG(TRACE) << "Initializing new process set with MPI: "\n',
                "  tensor_queue.Reopen();\n"
                '  LOG(TRACE) << "Initializing new process set with MPI: "\n',
            ),
            (
                "process_set.cc",
                '  LOG(TRACE) << "Initializing new process set with Gloo: "\n',
                "  tensor_queue.Reopen();\n"
                '  LOG(TRACE) << "Initializing new process set with Gloo: "\n',
            ),
        )
    ),
    (
        "horovod/torch/mpi_ops_v2.cc",
        "PYBIND11_MODULE(mpi_lib_v2, m) {\n",
        "struct WithoutGil {\n"
        "  py::module_& module;\n"
        "  template <typename Function> void def(const char* name, Function function) {\n"
        "    module.def(name, function, py::call_guard<py::gil_scoped_release>());\n"
        "  }\n"
        "};\n\n"
        "PYBIND11_MODULE(mpi_lib_v2, module) {\n"
        "  WithoutGil m{module};\n",
        _GIL,
    ),
    (
        "horovod/torch/mpi_ops_v2.cc",
        "      py::gil_scoped_release release_python_gil;\n",
        "",
        "it is released already",
    ),
    (
        "horovod/runner/mpi_run.py",
        "_NO_BINDING_ARGS = ['-bind-to none', '-map-by slot']",
        "_NO_BINDING_ARGS = ['--bind-to none', '--map-by slot']",
        "Open MPI 5 reads `-bind-to none` as the program `none`; 4 and MPICH take both forms",
    ),
    (
        "horovod/runner/mpi_run.py",
        "os.execve('/bin/sh', ['/bin/sh', '-c', mpirun_command], env)",
        "os.execve('/bin/sh', ['/bin/sh', '-c', 'exec ' + mpirun_command], env)",
        "a signal to horovodrun ended the shell and left mpirun and the ranks running",
    ),
    (
        "setup.py",
        "make_args.append('VERBOSE=1')",
        "make_args.append('--verbose')",
        "we build with Ninja, which pip installs: make may be missing",
    ),
]
