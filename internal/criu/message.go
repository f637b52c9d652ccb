package criu

import (
	"encoding/binary"
	"errors"
)

// Message writes the few protocol buffers that CRIU's service takes. The whole of
// a protobuf library would cost each start of the OCI command more than the
// start-up stage takes.
type Message []byte

// Uint appends a number.
func (m *Message) Uint(field int, v uint64) {
	*m = binary.AppendUvarint(*m, uint64(field)<<3)
	*m = binary.AppendUvarint(*m, v)
}

// Int appends a number that may be negative.
func (m *Message) Int(field int, v int) { m.Uint(field, uint64(int64(v))) }

// Bool appends a truth value.
func (m *Message) Bool(field int, v bool) {
	if v {
		m.Uint(field, 1)
	} else {
		m.Uint(field, 0)
	}
}

// Bytes appends a message within the message.
func (m *Message) Bytes(field int, b []byte) {
	*m = binary.AppendUvarint(*m, uint64(field)<<3|2)
	*m = binary.AppendUvarint(*m, uint64(len(b)))
	*m = append(*m, b...)
}

// Str appends a string.
func (m *Message) Str(field int, s string) { m.Bytes(field, []byte(s)) }

// Pair appends a message of two strings.
func (m *Message) Pair(field int, a, b string) {
	var p Message
	p.Str(1, a)
	p.Str(2, b)
	m.Bytes(field, p)
}

// Inherit appends a descriptor that a restored process is to use under a key.
func (m *Message) Inherit(key string, fd int) {
	var p Message
	p.Str(1, key)
	p.Int(2, fd)
	m.Bytes(OptInheritFD, p)
}

// Fields are what a message holds, the last of each field.
type Fields struct {
	Num  map[int]uint64
	Data map[int][]byte
}

var errProtobuf = errors.New("malformed protocol buffer")

// ReadFields reads a message.
func ReadFields(b []byte) (*Fields, error) {
	f := &Fields{map[int]uint64{}, map[int][]byte{}}
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
			f.Num[field], b = v, b[n:]
		case 2:
			l, n := binary.Uvarint(b)
			if n <= 0 || l > uint64(len(b)-n) {
				return nil, errProtobuf
			}
			f.Data[field], b = b[n:n+int(l)], b[n+int(l):]
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
