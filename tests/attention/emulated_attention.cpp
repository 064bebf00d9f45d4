// Runs compiled attention on a copy of another process's memory, for test_fused_attention.py: stdin has the sizes, the
// memory, and where in it addresses stand, as offsets; stdout gets all of the memory.

#include <stdio.h>

#include "../../src/castalia/attention/fused_attention.cpp"

int main() {
    int64_t header[5], at[9] = {};  // bytes, addresses, whether backward, whether bf16, problem; of each tensor
    if (fread(header, 8, 5, stdin) != 5 || fread(at, 8, 9, stdin) != 9) return 2;
    char *memory = (char *)aligned_alloc(64, (header[0] + 63) / 64 * 64);
    int64_t *addresses = (int64_t *)malloc(header[1] * 8);
    if (fread(memory, 1, header[0], stdin) != (size_t)header[0]) return 3;
    if (fread(addresses, 8, header[1], stdin) != (size_t)header[1]) return 4;
    for (int64_t i = 0; i < header[1]; i++) *(int64_t *)(memory + addresses[i]) += (int64_t)memory;
    const Problem *p = (const Problem *)(memory + header[4]);
    void *x[9];
    for (int i = 0; i < 9; i++) x[i] = memory + at[i];
    const int failed =
        header[2] ? castalia_attention_backward(p, header[3], x[0], x[1], x[2], x[3], x[4], (float *)x[5], x[6], x[7], x[8])
                  : castalia_attention(p, header[3], x[0], x[1], x[2], x[3], x[4], x[5], x[6], (float *)x[7]);
    if (failed) return 5;
    return fwrite(memory, 1, header[0], stdout) != (size_t)header[0];
}
