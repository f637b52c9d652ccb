package remote

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"net"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// JournalSocket is where systemd-journald takes records of its native protocol
// (systemd's "Native Journal Protocol").
const JournalSocket = "/run/systemd/journal/socket"

// journalSink writes to the journal.
type journalSink struct {
	path   string
	fields []byte // what every record says
	epoch  string
	count  uint64
	conn   *net.UnixConn
}

func newJournal(s Source, path string) *journalSink {
	var r [16]byte
	_, _ = rand.Read(r[:])
	j := &journalSink{path: path, epoch: hex.EncodeToString(r[:])}
	put := func(name, value string) { j.fields = appendField(j.fields, name, []byte(value)) }
	put("CONTAINER_ID", s.ID[:min(len(s.ID), 12)])
	put("CONTAINER_ID_FULL", s.ID)
	put("CONTAINER_NAME", s.Name)
	put("CONTAINER_TAG", s.Tag)
	put("IMAGE_NAME", s.Image)
	put("SYSLOG_IDENTIFIER", s.Tag)
	for k, v := range s.Attrs {
		put(k, v)
	}
	put("CONTAINER_LOG_EPOCH", j.epoch)
	return j
}

// journalField makes the name of a field: capitals, digits and underscores, no
// underscore first.
func journalField(s string) string {
	b := make([]byte, 0, len(s))
	for i := range len(s) {
		switch c := s[i]; {
		case c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '_' && len(b) > 0:
			b = append(b, c)
		case c >= 'a' && c <= 'z':
			b = append(b, c-'a'+'A')
		case len(b) > 0:
			b = append(b, '_')
		}
	}
	if len(b) > 64 { // journald takes no longer names
		b = b[:64]
	}
	return string(b)
}

// appendField appends a field; a value with newlines has its length before it.
func appendField(b []byte, name string, value []byte) []byte {
	if name == "" || name[0] >= '0' && name[0] <= '9' {
		return b
	}
	b = append(b, name...)
	if bytes.IndexByte(value, '\n') < 0 {
		return append(append(append(b, '='), value...), '\n')
	}
	b = append(b, '\n')
	b = binary.LittleEndian.AppendUint64(b, uint64(len(value)))
	return append(append(b, value...), '\n')
}

func (j *journalSink) format(b []byte, e Entry) []byte {
	b = append(b, j.fields...)
	if e.Stderr {
		b = append(b, "PRIORITY=3\n"...)
	} else {
		b = append(b, "PRIORITY=6\n"...)
	}
	j.count++
	b = append(b, "CONTAINER_LOG_ORDINAL="...)
	b = append(strconv.AppendUint(b, j.count, 10), "\nSYSLOG_TIMESTAMP="...)
	b = append(e.Time.AppendFormat(b, time.RFC3339Nano), '\n')
	if p := e.Partial; p != nil {
		if !p.Last {
			b = append(b, "CONTAINER_PARTIAL_MESSAGE=true\n"...)
		}
		b = append(b, "CONTAINER_PARTIAL_ID="+p.ID+"\nCONTAINER_PARTIAL_ORDINAL="...)
		b = append(strconv.AppendInt(b, int64(p.Ordinal), 10), "\nCONTAINER_PARTIAL_LAST="...)
		b = append(strconv.AppendBool(b, p.Last), '\n')
	}
	return appendField(b, "MESSAGE", e.Line)
}

func (j *journalSink) send(_ context.Context, batch []Entry) (int, error) {
	if j.conn == nil {
		c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: j.path, Net: "unixgram"})
		if err != nil {
			return 0, err
		}
		_ = c.SetWriteBuffer(1 << 20)
		j.conn = c
	}
	var b []byte
	for i, e := range batch {
		b = j.format(b[:0], e)
		_ = j.conn.SetWriteDeadline(time.Now().Add(writeTimeout))
		_, err := j.conn.Write(b)
		if errors.Is(err, unix.EMSGSIZE) || errors.Is(err, unix.ENOBUFS) {
			err = j.sendFile(b)
		}
		if err != nil {
			j.close()
			return i, err
		}
	}
	return len(batch), nil
}

// sendFile hands over what is too large for a datagram, as a sealed file.
func (j *journalSink) sendFile(b []byte) error {
	fd, err := unix.MemfdCreate("servin-journal", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), "journal record")
	defer f.Close()
	if _, err := f.Write(b); err != nil {
		return err
	}
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_WRITE|unix.F_SEAL_SEAL); err != nil {
		return err
	}
	_, _, err = j.conn.WriteMsgUnix(nil, unix.UnixRights(int(f.Fd())), nil)
	return err
}

func (j *journalSink) close() {
	if j.conn != nil {
		j.conn.Close()
		j.conn = nil
	}
}
