/* Bytes that sequences and nodes of the prefix tree share. */
#ifndef KVB_TEXT_H
#define KVB_TEXT_H

#include <stdint.h>

struct kvb_blob { int64_t refs; char *bytes; };

#endif
