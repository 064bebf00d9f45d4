// Runs the compiled step on a copy of another process's memory, for test_other_processors.py: stdin has the sizes, the
// memory, and where in it addresses stand, as offsets; stdout gets the logits. With the name of a file, stdout gets what
// is in it.

#include <stdio.h>

#include "../../src/castalia/native/step.cpp"

static int show(const char *name) {
    char content[4096];
    FILE *file = fopen(name, "rb");
    if (!file) return 6;
    const size_t size = fread(content, 1, sizeof content, file);
    return fwrite(content, 1, size, stdout) != size;
}

int main(int count, char **arguments) {
    if (count > 1) return show(arguments[1]);
    int64_t header[6];  // bytes, addresses, offsets of model, cache and batch, threads
    if (fread(header, 8, 6, stdin) != 6) return 2;
    char *memory = (char *)aligned_alloc(64, (header[0] + 63) / 64 * 64);
    int64_t *addresses = (int64_t *)malloc(header[1] * 8);
    if (fread(memory, 1, header[0], stdin) != (size_t)header[0]) return 3;
    if (fread(addresses, 8, header[1], stdin) != (size_t)header[1]) return 4;
    for (int64_t i = 0; i < header[1]; i++) *(int64_t *)(memory + addresses[i]) += (int64_t)memory;
    const Model *model = (const Model *)(memory + header[2]);
    const Batch *batch = (const Batch *)(memory + header[4]);
    if (castalia_forward(model, (const Cache *)(memory + header[3]), batch, (int)header[5])) return 5;
    return fwrite(batch->logits, sizeof(float), batch->wanted * model->vocab, stdout) == 0;
}
