package vmwire

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/libp2p/go-yamux/v5"
)

// A port survives the processes at its ends, so bytes of an earlier
// conversation, and half a frame of it, may be in it. Each conversation begins
// with four lines, each after a newline:
//
//	host:  cloudos-port 1 hello NONCE    again every second until it is answered
//	guest: cloudos-port 1 ready NONCE    for each hello
//	host:  cloudos-port 1 start NONCE
//	guest: cloudos-port 1 go NONCE
//
// Who waits for a line drops everything else. Behind their last line both speak
// yamux, the host as its client. The host's first hello comes after more newlines
// than a frame is long: a guest that still waits for the rest of a frame then meets
// what is none, and ends the earlier conversation.
const (
	hello = "cloudos-port 1 hello "
	ready = "cloudos-port 1 ready "
	start = "cloudos-port 1 start "
	begin = "cloudos-port 1 go "

	nonceLen   = 32
	maxHeader  = 600
	maxSkipped = 64 << 20
	maxFrame   = 64 << 10
	flush      = maxFrame + 1<<10
	repeat     = time.Second
)

// config is the multiplexer's. Nothing in it is timed: a paused machine is not a
// dead one, and an idle one is not to be woken.
func config() *yamux.Config {
	c := yamux.DefaultConfig()
	c.EnableKeepAlive = false
	c.MeasureRTTInterval = never
	c.ConnectionWriteTimeout = never
	c.MaxIncomingStreams = 4096
	c.MaxStreamWindowSize = 4 << 20
	c.MaxMessageSize = maxFrame
	c.ReadBufSize = 0 // the greeting's buffer serves
	c.LogOutput = io.Discard
	return c
}

const never = 10000 * time.Hour

// Session is a conversation over a port.
type Session struct {
	mux *yamux.Session
}

// joined makes a connection of a port, reading through the buffer that the
// greeting was read with. Ports have no deadlines.
type joined struct {
	io.Reader
	io.WriteCloser
}

func (joined) LocalAddr() net.Addr              { return address{} }
func (joined) RemoteAddr() net.Addr             { return address{} }
func (joined) SetDeadline(time.Time) error      { return nil }
func (joined) SetReadDeadline(time.Time) error  { return nil }
func (joined) SetWriteDeadline(time.Time) error { return nil }

type address struct{}

func (address) Network() string { return "port" }
func (address) String() string  { return Port }

// readLine returns the next line without its end; lines longer than maxHeader
// are dropped.
func readLine(r *bufio.Reader, skipped *int) (string, error) {
	line := make([]byte, 0, 128)
	long := false
	for {
		b, err := r.ReadByte()
		if err != nil {
			return "", err
		}
		if *skipped++; *skipped > maxSkipped {
			return "", errors.New("no greeting came")
		}
		if b == '\n' {
			if long {
				line, long = line[:0], false
				continue
			}
			return string(line), nil
		}
		if len(line) >= maxHeader {
			long = true
			continue
		}
		line = append(line, b)
	}
}

// Host begins a conversation from the host's side, waiting for the guest to
// come up. The session owns conn from then on.
func Host(ctx context.Context, conn io.ReadWriteCloser) (*Session, error) {
	raw := make([]byte, nonceLen/2)
	if _, err := rand.Read(raw); err != nil {
		return nil, err
	}
	nonce := hex.EncodeToString(raw)
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	answered, asked := make(chan struct{}), make(chan error, 1)
	go func() { asked <- ask(conn, nonce, answered) }()
	r := bufio.NewReaderSize(conn, maxFrame)
	err := await(r, ready+nonce)
	close(answered)
	if err != nil {
		conn.Close() // also ends a write that waits
	}
	if werr := <-asked; err == nil {
		err = werr
	}
	if err == nil {
		_, err = io.WriteString(conn, "\n"+start+nonce+"\n")
	}
	if err == nil {
		err = await(r, begin+nonce)
	}
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("the machine did not answer: %w", errors.Join(ctx.Err(), err))
	}
	mux, err := yamux.Client(joined{r, conn}, config(), nil)
	if err != nil {
		return nil, err
	}
	return &Session{mux: mux}, nil
}

// ask says hello until the answer is there.
func ask(w io.Writer, nonce string, answered <-chan struct{}) error {
	line := []byte("\n" + hello + nonce + "\n")
	if _, err := w.Write(append(bytes.Repeat([]byte{'\n'}, flush), line...)); err != nil {
		return err
	}
	t := time.NewTicker(repeat)
	defer t.Stop()
	for {
		select {
		case <-answered:
			return nil
		case <-t.C:
			if _, err := w.Write(line); err != nil {
				return err
			}
		}
	}
}

// await drops lines until the wanted one.
func await(r *bufio.Reader, want string) error {
	for skipped := 0; ; {
		line, err := readLine(r, &skipped)
		if err != nil {
			return err
		}
		if line == want {
			return nil
		}
	}
}

// Guest waits for a host's greeting on the port and answers it. Bytes that the
// session's end leaves in the port are the next conversation's.
func Guest(conn io.ReadWriteCloser) (*Session, error) {
	r := bufio.NewReaderSize(conn, maxFrame)
	last := ""
	for skipped := 0; ; {
		line, err := readLine(r, &skipped)
		if err != nil {
			return nil, err
		}
		if nonce, ok := strings.CutPrefix(line, hello); ok && len(nonce) == nonceLen && strings.Trim(nonce, "0123456789abcdef") == "" {
			last, skipped = nonce, 0
			if _, err := io.WriteString(conn, "\n"+ready+nonce+"\n"); err != nil {
				return nil, err
			}
		}
		if nonce, ok := strings.CutPrefix(line, start); ok && last != "" && nonce == last {
			break
		}
	}
	if _, err := io.WriteString(conn, "\n"+begin+last+"\n"); err != nil {
		return nil, err
	}
	mux, err := yamux.Server(joined{r, conn}, config(), nil)
	if err != nil {
		return nil, err
	}
	return &Session{mux: mux}, nil
}

// Close ends the conversation and all its streams.
func (s *Session) Close() error { return s.mux.Close() }

// Done is closed when the conversation has ended.
func (s *Session) Done() <-chan struct{} { return s.mux.CloseChan() }

// Streams counts the open streams.
func (s *Session) Streams() int { return s.mux.NumStreams() }

// Purposes of a stream: the first word of its first line.
const (
	API     = "api" // the engine's API: HTTP to servind
	Control = "ctl" // the control API: HTTP to the first process
	TCP     = "tcp" // "tcp HOST:PORT": a connection made from inside the guest
	UDP     = "udp" // "udp HOST:PORT": datagrams of one client, each after its length (2 bytes, big endian)
)

// Purpose is a stream's first line.
type Purpose struct {
	// Kind is API, Control, TCP or UDP; Address is HOST:PORT of the last two.
	Kind, Address string
}

func (p Purpose) String() string { return strings.TrimSpace(p.Kind + " " + p.Address) }

// ParsePurpose reads a stream's first line, without its end.
func ParsePurpose(line string) (Purpose, error) {
	kind, address, more := strings.Cut(line, " ")
	switch kind {
	case API, Control:
		if !more {
			return Purpose{Kind: kind}, nil
		}
	case TCP, UDP:
		host, port, err := net.SplitHostPort(address)
		if err != nil {
			return Purpose{}, fmt.Errorf("cannot read the address of a stream: %w", err)
		}
		if n, ok := number(port); host == "" || !ok || n == 0 {
			return Purpose{}, fmt.Errorf("cannot read %q as HOST:PORT of a stream", address)
		}
		return Purpose{Kind: kind, Address: address}, nil
	}
	return Purpose{}, fmt.Errorf("a stream is for api, ctl, tcp HOST:PORT or udp HOST:PORT, not for %q", line)
}

func number(s string) (int, bool) {
	n := 0
	for _, c := range []byte(s) {
		if c < '0' || c > '9' || n > 6553 {
			return 0, false
		}
		n = n*10 + int(c-'0')
	}
	return n, s != "" && n <= 65535
}

// Open opens a stream for a purpose. The guest's refusal, such as a connection
// refused inside it, is the error. Its CloseWrite ends one direction alone.
func (s *Session) Open(ctx context.Context, p Purpose) (Stream, error) {
	stream, err := s.mux.OpenStream(ctx)
	if err != nil {
		return nil, fmt.Errorf("cannot reach the machine: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { stream.Reset() })
	if _, err := io.WriteString(stream, p.String()+"\n"); err != nil {
		stop()
		stream.Close()
		return nil, fmt.Errorf("cannot reach the machine: %w", err)
	}
	line, err := header(stream)
	if !stop() {
		stream.Close()
		return nil, ctx.Err()
	}
	if err != nil {
		stream.Close()
		return nil, fmt.Errorf("the machine ended the stream: %w", err)
	}
	if why, refused := strings.CutPrefix(line, "err "); refused {
		stream.Close()
		return nil, errors.New(why)
	}
	if line != "ok" {
		stream.Close()
		return nil, fmt.Errorf("the machine answered %q to a stream", line)
	}
	return stream, nil
}

// header reads a line byte by byte: what follows it belongs to the stream.
func header(r io.Reader) (string, error) {
	var line []byte
	b := make([]byte, 1)
	for {
		if _, err := io.ReadFull(r, b); err != nil {
			return "", err
		}
		if b[0] == '\n' {
			return string(line), nil
		}
		if len(line) >= maxHeader {
			return "", errors.New("the first line is too long")
		}
		line = append(line, b[0])
	}
}

// Stream is a connection over the port.
type Stream interface {
	net.Conn
	// CloseWrite says that no more comes from this side; reading goes on.
	CloseWrite() error
	// Reset ends both directions at once, as an error on the other side.
	Reset() error
}

// Incoming is a stream that the guest was asked for and has to Answer.
type Incoming struct {
	Stream
}

// Accept waits for a stream.
func (s *Session) Accept() (*Incoming, error) {
	stream, err := s.mux.AcceptStream()
	if err != nil {
		return nil, err
	}
	return &Incoming{Stream: stream}, nil
}

// Purpose reads what the stream is for, within a time.
func (in *Incoming) Purpose(patience time.Duration) (Purpose, error) {
	in.SetReadDeadline(time.Now().Add(patience))
	defer in.SetReadDeadline(time.Time{})
	line, err := header(in)
	if err != nil {
		return Purpose{}, err
	}
	return ParsePurpose(line)
}

// Answer accepts the stream, or refuses it with the error.
func (in *Incoming) Answer(err error) error {
	line := "ok\n"
	if err != nil {
		text := strings.Map(func(r rune) rune {
			if r < ' ' || r == 0x7f {
				return ' '
			}
			return r
		}, err.Error())
		line = "err " + text[:min(len(text), 500)] + "\n"
	}
	_, werr := io.WriteString(in, line)
	return werr
}

// Client speaks HTTP over streams of one kind, API or Control.
func (s *Session) Client(kind string) *http.Client {
	return &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			c, err := s.Open(ctx, Purpose{Kind: kind})
			if err != nil {
				return nil, err
			}
			return c, nil
		},
		DisableCompression: true, MaxIdleConnsPerHost: 4, IdleConnTimeout: time.Minute,
	}}
}

// MaxDatagram bounds a datagram on a UDP stream.
const MaxDatagram = 65507

// WriteDatagram writes one datagram to a UDP stream; buf is scratch of at least
// MaxDatagram+2 bytes whose first two are the length's place: the datagram is buf[2:2+n].
func WriteDatagram(w io.Writer, buf []byte, n int) error {
	if n < 0 || n > MaxDatagram {
		return fmt.Errorf("a datagram of %d bytes is too long", n)
	}
	binary.BigEndian.PutUint16(buf, uint16(n))
	_, err := w.Write(buf[:2+n])
	return err
}

// ReadDatagram reads one into buf and tells its length.
func ReadDatagram(r io.Reader, buf []byte) (int, error) {
	var head [2]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return 0, err
	}
	n := int(binary.BigEndian.Uint16(head[:]))
	if n > len(buf) || n > MaxDatagram {
		return 0, fmt.Errorf("a datagram of %d bytes is too long", n)
	}
	if _, err := io.ReadFull(r, buf[:n]); err != nil {
		return 0, errors.Join(io.ErrUnexpectedEOF, err)
	}
	return n, nil
}
