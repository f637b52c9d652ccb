#ifndef FIRST_H
#define FIRST_H

int first_main(void);

#endif
