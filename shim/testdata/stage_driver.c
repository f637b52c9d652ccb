/* Runs the start-up stage on descriptor 3, for tests. */
#include "../stage.h"

int main(void) { stage_main(3); }
