// SPDX-License-Identifier: Apache-2.0
// kernel.cpp - one kernel as a library for tests: compiled once per row and GPU class, with
// KERNEL_BODY, KERNEL_NAME, KERNEL_ARGS and the constants of sdpa_rows.def on the command line.
#define STRING_OF(x) #x
#define STRING(x) STRING_OF(x)
#include STRING(KERNEL_BODY)

#ifndef CLUSTER
#define CLUSTER 1
#endif
#ifndef LAUNCH_THREADS
#define LAUNCH_THREADS NUM_THREADS
#endif

namespace {

struct tensor {
    const char *name;
    void *data;
    long long bytes;
    int is_output;
};

} // namespace

extern "C" {

// For the Python side to compare its own idea of the struct with.
int emu_args_size() { return static_cast<int>(sizeof(KERNEL_ARGS)); }

// Runs the grid. landing: 0 early, 1 late, 2 random. is_output: 2 for what is read before it is
// written, in place. Returns 0, or 1 with the reason in `message`.
int emu_launch(const KERNEL_ARGS *args, int grid, const tensor *tensors, int num_tensors,
               int landing, unsigned long long seed, int check_order, char *message,
               int message_size, unsigned long long *bank_conflicts) {
    emu::machine &gpu = emu::the_machine();
    gpu.global.clear();
    for (int i = 0; i < num_tensors; i++)
        gpu.global.add(tensors[i].name, tensors[i].data, tensors[i].bytes,
                       tensors[i].is_output != 0, tensors[i].is_output == 2);
    emu::options how;
    how.copies = static_cast<emu::landing>(landing);
    how.seed = seed;
    how.check_order = check_order != 0;
    std::string problem =
        gpu.launch(grid, LAUNCH_THREADS, SMEM_BYTES, how, [args] { KERNEL_NAME(*args); }, CLUSTER);
    std::snprintf(message, static_cast<std::size_t>(message_size), "%s", problem.c_str());
    *bank_conflicts = gpu.bank_conflicts;
    return problem.empty() ? 0 : 1;
}

} // extern "C"
