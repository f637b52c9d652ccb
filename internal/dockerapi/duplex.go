package dockerapi

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/moby/moby/api/types/container"
)

// Stream types of Docker's framing: one byte type, three zero bytes, four bytes
// big-endian length, payload.
const (
	frameStdout = 1
	frameStderr = 2
	frameSystem = 3
	frameHeader = 8
	copyBuffer  = 32 << 10
)

// linger is how long a finished stream waits for the client to close too, so
// that unread input does not turn the end of the stream into a reset.
const linger = time.Second

// headerPatience is how long output waits for a client to read the header: long
// enough for one that a busy machine keeps from its turn.
const headerPatience = 2 * time.Second

const (
	contentTypeRaw         = "application/vnd.docker.raw-stream"
	contentTypeMultiplexed = "application/vnd.docker.multiplexed-stream"
)

var copyBuffers = sync.Pool{New: func() any { return new([frameHeader + copyBuffer]byte) }}

// duplex is a connection taken over from HTTP.
type duplex struct {
	conn net.Conn
	in   io.Reader // conn, after what the server had read ahead
	mu   sync.Mutex
	// answered is when the header went out alone; zero once output may follow.
	answered time.Time

	input    chan struct{} // closed when reading has ended; nil before pump
	gone     atomic.Bool   // the client has closed its end altogether
	detached atomic.Bool   // the client typed the detach keys
}

// takeOver hijacks the connection. Nothing is written yet.
func takeOver(w *response) (*duplex, error) {
	conn, brw, err := w.Hijack()
	if err != nil {
		return nil, err
	}
	_ = conn.SetDeadline(time.Time{})
	d := &duplex{conn: conn, in: conn}
	if n := brw.Reader.Buffered(); n > 0 {
		// Copied, for net/http uses the buffer again.
		ahead, _ := brw.Reader.Peek(n)
		d.in = io.MultiReader(bytes.NewReader(bytes.Clone(ahead)), conn)
	}
	return d, nil
}

// Write writes to the client; concurrent writes do not mix.
func (d *duplex) Write(p []byte) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.answered.IsZero() {
		d.headerRead()
	}
	return d.conn.Write(p)
}

// headerRead holds output back until the client has read the header, for a
// moment at most. Clients that read the header through a buffer and go on below
// it (Python's) would lose output that came along with it.
func (d *duplex) headerRead() {
	since := d.answered
	d.answered = time.Time{}
	limit, unread := 2*time.Millisecond, func() bool { return true }
	if c, ok := d.conn.(*net.UnixConn); ok {
		// The kernel tells what the peer has not read yet.
		if rc, err := c.SyscallConn(); err == nil {
			limit = headerPatience
			unread = func() bool {
				n := 0
				_ = rc.Control(func(fd uintptr) { n, _ = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ) })
				return n > 0
			}
		}
	}
	for pause := 20 * time.Microsecond; time.Since(since) < limit && unread(); pause = min(2*pause, time.Millisecond) {
		time.Sleep(pause)
	}
}

// accept answers the request that asked for the stream: 101 if it asked for an
// upgrade, else the old 200 with a raw body that ends with the connection.
// extra follows the header in the same write.
func (d *duplex) accept(upgrade bool, contentType string, h http.Header, extra []byte) error {
	b := make([]byte, 0, 384+len(extra))
	if upgrade {
		b = append(b, "HTTP/1.1 101 UPGRADED\r\nContent-Type: "+contentType+"\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n"...)
	} else {
		b = append(b, "HTTP/1.1 200 OK\r\nContent-Type: "+contentTypeRaw+"\r\n"...)
	}
	for _, k := range [...]string{"Api-Version", "Docker-Experimental", "Ostype", "Server"} {
		if v := h[k]; len(v) > 0 {
			b = append(b, k...)
			b = append(b, ": "...)
			b = append(b, v[0]...)
			b = append(b, "\r\n"...)
		}
	}
	b = append(append(b, "\r\n"...), extra...)
	_, err := d.Write(b)
	if extra == nil {
		d.answered = time.Now()
	}
	return err
}

// appendFrame appends one frame to b.
func appendFrame(b []byte, kind byte, payload []byte) []byte {
	b = append(b, kind, 0, 0, 0)
	b = binary.BigEndian.AppendUint32(b, uint32(len(payload)))
	return append(b, payload...)
}

// copyOut copies an output stream to the client: framed as the kind, or as it
// is with kind 0. Header and payload leave in one write.
func copyOut(dst io.Writer, kind byte, src io.Reader) error {
	buf := copyBuffers.Get().(*[frameHeader + copyBuffer]byte)
	defer copyBuffers.Put(buf)
	for {
		n, err := src.Read(buf[frameHeader:])
		if n > 0 {
			out := buf[frameHeader : frameHeader+n]
			if kind != 0 {
				buf[0], buf[1], buf[2], buf[3] = kind, 0, 0, 0
				binary.BigEndian.PutUint32(buf[4:], uint32(n))
				out = buf[:frameHeader+n]
			}
			if _, werr := dst.Write(out); werr != nil {
				return werr
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// pump connects the client with the streams until the output has ended, the
// client has gone, has typed the detach keys, or ctx is done. It closes the
// streams. With mux output is framed. With an exit channel it then waits for the
// process's end too and returns it; told is false where the client left first.
// Without output and exit it lasts until the input has ended. finish must follow.
func (d *duplex) pump(ctx context.Context, a Attached, mux bool, keys []byte, exit <-chan container.WaitResponse) (res container.WaitResponse, told bool) {
	closeStreams := sync.OnceFunc(func() {
		if a.Close != nil {
			_ = a.Close()
		}
	})
	defer closeStreams()
	stop := context.AfterFunc(ctx, func() {
		d.gone.Store(true)
		closeStreams()
		_ = d.conn.SetReadDeadline(time.Unix(1, 0))
		_ = d.conn.SetWriteDeadline(time.Now().Add(linger)) // for a client that reads nothing
	})
	defer stop()

	outputs := a.Stdout != nil || a.Stderr != nil
	d.input = make(chan struct{})
	go func() {
		defer close(d.input)
		if d.copyIn(a, keys) && (outputs || exit != nil) && !waitHangup(d.conn) {
			return // finish put a deadline on it: all is over
		}
		if !d.detached.Load() {
			d.gone.Store(true)
		}
		closeStreams()
	}()

	if outputs {
		d.copyOutputs(a, mux, closeStreams)
		if exit == nil {
			return res, false
		}
	}
	select {
	case res, told = <-exit:
	case <-d.input:
	}
	return res, told
}

func (d *duplex) copyOutputs(a Attached, mux bool, closeStreams func()) {
	var wg sync.WaitGroup
	out := func(kind byte, src io.Reader) {
		if !mux {
			kind = 0
		}
		if copyOut(d, kind, src) != nil {
			closeStreams() // the client is gone; no use for the other stream
		}
	}
	if a.Stderr != nil && a.Stdout != nil {
		wg.Go(func() { out(frameStderr, a.Stderr) })
	} else if a.Stderr != nil {
		out(frameStderr, a.Stderr)
	}
	if a.Stdout != nil {
		out(frameStdout, a.Stdout)
	}
	wg.Wait()
}

// copyIn passes the client's input on, or drops it where nobody wants it. It
// tells whether the client half-closed in good order.
func (d *duplex) copyIn(a Attached, keys []byte) (eof bool) {
	var small [512]byte
	buf := small[:]
	if a.Stdin != nil {
		p := copyBuffers.Get().(*[frameHeader + copyBuffer]byte)
		defer copyBuffers.Put(p)
		buf = p[:]
	}
	var esc *escaper
	var escBuf []byte
	if a.Terminal && a.Stdin != nil && len(keys) > 0 {
		esc = &escaper{keys: keys}
	}
	open := a.Stdin != nil
	for {
		n, err := d.in.Read(buf)
		if n > 0 && open {
			p := buf[:n]
			if esc != nil {
				var detached bool
				p, detached = esc.filter(escBuf, p)
				escBuf = p
				if detached {
					_, _ = a.Stdin.Write(p)
					d.detached.Store(true)
					return false
				}
			}
			if _, werr := a.Stdin.Write(p); werr != nil {
				open = false // the process closed its input; drop the rest
			}
		}
		if err != nil {
			if open && errors.Is(err, io.EOF) {
				if esc != nil && esc.held > 0 {
					_, _ = a.Stdin.Write(esc.rest())
				}
				_ = a.Stdin.Close()
			}
			return errors.Is(err, io.EOF)
		}
	}
}

// finish ends the stream in order: what was written is delivered and followed
// by an end of file, then the connection is closed.
func (d *duplex) finish() {
	defer d.conn.Close()
	cw, ok := d.conn.(interface{ CloseWrite() error })
	if !ok || cw.CloseWrite() != nil || d.input == nil {
		return
	}
	_ = d.conn.SetReadDeadline(time.Now().Add(linger))
	<-d.input
}

// waitHangup waits until the peer has closed both directions: a half-close
// alone is the normal end of input. It holds no thread. It returns false if the
// connection's read deadline passed or it was closed here. Over TCP a full
// close looks like a half one until something is written.
func waitHangup(conn net.Conn) bool {
	if t, ok := conn.(*tls.Conn); ok {
		conn = t.NetConn()
	}
	sc, ok := conn.(syscall.Conn)
	if !ok {
		return false
	}
	rc, err := sc.SyscallConn()
	if err != nil {
		return false
	}
	err = rc.Read(func(fd uintptr) bool {
		p := []unix.PollFd{{Fd: int32(fd)}}
		_, perr := unix.Poll(p, 0)
		return perr == nil && p[0].Revents&(unix.POLLHUP|unix.POLLERR|unix.POLLNVAL) != 0
	})
	return err == nil
}
