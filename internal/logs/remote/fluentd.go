package remote

import (
	"bufio"
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"io"
	"maps"
	"net"
	"slices"
	"strconv"
	"time"

	"github.com/cloudos-io/cloudos/internal/logs/driver"
)

// fluentdSink speaks the Fluentd Forward Protocol, version 1: one record in
// Message mode, several in Forward mode.
type fluentdSink struct {
	o    driver.FluentdOptions
	src  Source
	keys []string // of the attributes, sorted
	dial *net.Dialer
	s    *stream
	in   *bufio.Reader // of acknowledgements
}

func newFluentd(s Source) (*fluentdSink, error) {
	o, err := driver.ParseFluentd(s.Options)
	if err != nil {
		return nil, err
	}
	return &fluentdSink{o: o, src: s, keys: slices.Sorted(maps.Keys(s.Attrs)), dial: &net.Dialer{Timeout: 10 * time.Second}}, nil
}

func (f *fluentdSink) connect(ctx context.Context) error {
	if f.s != nil {
		return nil
	}
	network := f.o.Network
	if network == "tls" {
		network = "tcp"
	}
	below, err := f.dial.DialContext(ctx, network, f.o.Address)
	if err != nil {
		return err
	}
	c := below
	if f.o.Network == "tls" {
		host, _, _ := net.SplitHostPort(f.o.Address)
		if c, err = secure(ctx, below, &tls.Config{MinVersion: tls.VersionTLS12, ServerName: host}, f.dial.Timeout); err != nil {
			return err
		}
	}
	if f.s, err = newStream(c, below, !f.o.RequestAck); err != nil {
		c.Close()
		return err
	}
	f.in = bufio.NewReaderSize(c, 512)
	return nil
}

// MessagePack, what of it the protocol needs.

func mpString[T string | []byte](b []byte, s T) []byte {
	switch n := len(s); {
	case n < 32:
		b = append(b, 0xa0|byte(n))
	case n < 1<<8:
		b = append(b, 0xd9, byte(n))
	case n < 1<<16:
		b = binary.BigEndian.AppendUint16(append(b, 0xda), uint16(n))
	default:
		b = binary.BigEndian.AppendUint32(append(b, 0xdb), uint32(n))
	}
	return append(b, s...)
}

func mpMap(b []byte, n int) []byte {
	if n < 16 {
		return append(b, 0x80|byte(n))
	}
	return binary.BigEndian.AppendUint16(append(b, 0xde), uint16(n))
}

func mpArray(b []byte, n int) []byte {
	if n < 16 {
		return append(b, 0x90|byte(n))
	}
	return binary.BigEndian.AppendUint32(append(b, 0xdd), uint32(n))
}

func (f *fluentdSink) time(b []byte, t time.Time) []byte {
	if f.o.SubSecond { // EventTime, ext type 0
		b = append(b, 0xd7, 0x00)
		b = binary.BigEndian.AppendUint32(b, uint32(t.Unix()))
		return binary.BigEndian.AppendUint32(b, uint32(t.Nanosecond()))
	}
	return binary.BigEndian.AppendUint64(append(b, 0xd3), uint64(t.Unix()))
}

func (f *fluentdSink) record(b []byte, e Entry) []byte {
	n := 4 + len(f.keys)
	if e.Partial != nil {
		n += 4
	}
	b = mpMap(b, min(n, 1<<16-1))
	put := func(k, v string) { b = mpString(mpString(b, k), v) }
	put("container_id", f.src.ID)
	put("container_name", "/"+f.src.Name)
	source := "stdout"
	if e.Stderr {
		source = "stderr"
	}
	put("source", source)
	b = mpString(mpString(b, "log"), e.Line)
	for _, k := range f.keys {
		put(k, f.src.Attrs[k])
	}
	if p := e.Partial; p != nil {
		put("partial_message", "true")
		put("partial_id", p.ID)
		put("partial_ordinal", strconv.Itoa(p.Ordinal))
		put("partial_last", strconv.FormatBool(p.Last))
	}
	return b
}

// encode makes one message of a batch; chunk is to be acknowledged, if any.
func (f *fluentdSink) encode(batch []Entry, chunk string) []byte {
	var b []byte
	if len(batch) == 1 {
		n := 3
		if chunk != "" {
			n = 4
		}
		b = mpString(mpArray(b, n), f.src.Tag)
		b = f.record(f.time(b, batch[0].Time), batch[0])
		if chunk != "" {
			b = mpString(mpString(mpMap(b, 1), "chunk"), chunk)
		}
		return b
	}
	n := 2
	if chunk != "" {
		n = 3
	}
	b = mpString(mpArray(b, n), f.src.Tag)
	b = mpArray(b, len(batch))
	for _, e := range batch {
		b = f.record(f.time(mpArray(b, 2), e.Time), e)
	}
	if chunk != "" {
		b = mpString(mpString(mpMap(b, 1), "chunk"), chunk)
	}
	return b
}

func (f *fluentdSink) send(ctx context.Context, batch []Entry) (int, error) {
	if err := f.connect(ctx); err != nil {
		return 0, err
	}
	chunk := ""
	if f.o.RequestAck {
		var r [16]byte
		_, _ = rand.Read(r[:])
		chunk = base64.StdEncoding.EncodeToString(r[:])
	}
	err := f.s.put(ctx, f.encode(batch, chunk))
	if err == nil && chunk != "" {
		wait := f.o.ReadTimeout
		if wait == 0 {
			wait = writeTimeout
		}
		_ = f.s.SetReadDeadline(time.Now().Add(wait))
		err = readAck(f.in, chunk)
	}
	if err != nil {
		f.close()
		return 0, err
	}
	return len(batch), nil
}

// maxAck bounds an acknowledgement's strings.
const maxAck = 256

// readAck reads {"ack": chunk}.
func readAck(in *bufio.Reader, chunk string) error {
	n, err := in.ReadByte()
	if err != nil {
		return err
	}
	if n&0xf0 != 0x80 {
		return fmt.Errorf("cannot read an acknowledgement: unexpected byte %#x", n)
	}
	found := ""
	for range n & 0x0f {
		k, err := readString(in)
		if err != nil {
			return err
		}
		v, err := readString(in)
		if err != nil {
			return err
		}
		if k == "ack" {
			found = v
		}
	}
	if found != chunk {
		return fmt.Errorf("the other side acknowledged %q instead of %q", found, chunk)
	}
	return nil
}

func readString(in *bufio.Reader) (string, error) {
	c, err := in.ReadByte()
	if err != nil {
		return "", err
	}
	n := 0
	switch {
	case c&0xe0 == 0xa0:
		n = int(c & 0x1f)
	case c == 0xd9:
		l, err := in.ReadByte()
		if err != nil {
			return "", err
		}
		n = int(l)
	default:
		return "", fmt.Errorf("cannot read an acknowledgement: unexpected byte %#x", c)
	}
	if n > maxAck {
		return "", fmt.Errorf("cannot read an acknowledgement of %d bytes", n)
	}
	b := make([]byte, n)
	_, err = io.ReadFull(in, b)
	return string(b), err
}

func (f *fluentdSink) close() {
	if f.s != nil {
		f.s.Close()
		f.s, f.in = nil, nil
	}
}
