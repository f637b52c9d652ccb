package ociruntime

import (
	"encoding/binary"
	"errors"
)

// pb writes the few protocol buffers that CRIU's service takes. The whole of a
// protobuf library would cost each start more than the stage takes.
type pb []byte

func (m *pb) uint(field int, v uint64) {
	*m = binary.AppendUvarint(*m, uint64(field)<<3)
	*m = binary.AppendUvarint(*m, v)
}

func (m *pb) int(field int, v int) { m.uint(field, uint64(int64(v))) }

func (m *pb) bool(field int, v bool) {
	if v {
		m.uint(field, 1)
	} else {
		m.uint(field, 0)
	}
}

func (m *pb) bytes(field int, b []byte) {
	*m = binary.AppendUvarint(*m, uint64(field)<<3|2)
	*m = binary.AppendUvarint(*m, uint64(len(b)))
	*m = append(*m, b...)
}

func (m *pb) str(field int, s string) { m.bytes(field, []byte(s)) }

// pair is a message of two strings.
func (m *pb) pair(field int, a, b string) {
	var p pb
	p.str(1, a)
	p.str(2, b)
	m.bytes(field, p)
}

// fields are what a message holds, the last of each field.
type fields struct {
	num  map[int]uint64
	data map[int][]byte
}

var errProtobuf = errors.New("malformed protocol buffer")

func readFields(b []byte) (*fields, error) {
	f := &fields{map[int]uint64{}, map[int][]byte{}}
	for len(b) > 0 {
		tag, n := binary.Uvarint(b)
		if n <= 0 || tag>>3 == 0 || tag>>3 > 1<<29 {
			return nil, errProtobuf
		}
		b = b[n:]
		field := int(tag >> 3)
		switch tag & 7 {
		case 0:
			v, n := binary.Uvarint(b)
			if n <= 0 {
				return nil, errProtobuf
			}
			f.num[field], b = v, b[n:]
		case 2:
			l, n := binary.Uvarint(b)
			if n <= 0 || l > uint64(len(b)-n) {
				return nil, errProtobuf
			}
			f.data[field], b = b[n:n+int(l)], b[n+int(l):]
		case 1, 5:
			size := 8
			if tag&7 == 5 {
				size = 4
			}
			if len(b) < size {
				return nil, errProtobuf
			}
			b = b[size:]
		default:
			return nil, errProtobuf
		}
	}
	return f, nil
}
