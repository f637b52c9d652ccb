package client

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net/url"
	"sync"
)

const (
	mediaRaw         = "application/vnd.docker.raw-stream"
	mediaMultiplexed = "application/vnd.docker.multiplexed-stream"
)

// Stream is a connection that an exchange turned into a raw two-way stream: the
// standard streams of a container or exec. It is cut when the context that made
// it ends.
type Stream struct {
	k    *conn
	stop func() bool
	ctx  context.Context
	once sync.Once
	// Multiplexed tells that output is framed (see Demux); with a terminal it is
	// not. Known for attach alone; an exec's caller knows whether it asked for a
	// terminal.
	Multiplexed bool
}

// upgrade makes a stream of a request.
func (c *Client) upgrade(ctx context.Context, path string, q url.Values, in any) (*Stream, error) {
	r := &request{method: "POST", path: path, query: q, json: in, upgrade: true}
	resp, err := c.send(ctx, r)
	if err != nil {
		return nil, err
	}
	if resp.status != 101 && resp.header["content-type"] != mediaRaw && resp.header["content-type"] != mediaMultiplexed {
		resp.body.Close()
		return nil, fmt.Errorf("the engine did not make a stream of %s (status %d)", path, resp.status)
	}
	return &Stream{k: resp.conn, ctx: ctx, stop: watch(ctx, resp.conn), Multiplexed: resp.header["content-type"] == mediaMultiplexed}, nil
}

// Read reads output as it comes; use Demux where it is framed.
func (s *Stream) Read(p []byte) (int, error) {
	n, err := s.k.br.Read(p)
	if err != nil && err != io.EOF {
		err = ctxErr(s.ctx, err)
	}
	return n, err
}

// Write writes to standard input.
func (s *Stream) Write(p []byte) (int, error) {
	n, err := s.k.Write(p)
	return n, ctxErr(s.ctx, err)
}

// CloseWrite ends standard input; output goes on.
func (s *Stream) CloseWrite() error {
	if cw, ok := s.k.Conn.(interface{ CloseWrite() error }); ok {
		return cw.CloseWrite()
	}
	return nil
}

// Close drops the stream.
func (s *Stream) Close() error {
	var err error
	s.once.Do(func() {
		s.stop()
		err = s.k.Close()
	})
	return err
}

// Frame types of a multiplexed stream. A frame is a header of 8 bytes (type,
// three zeros, length as a big-endian 32-bit number) and the data.
const (
	frameStdin   = 0
	frameStdout  = 1
	frameStderr  = 2
	frameControl = 3
)

// maxControl bounds a control frame, which is read whole.
const maxControl = 1 << 20

// Demux copies a multiplexed stream's output to its two destinations until the
// stream ends. A nil destination drops.
func Demux(stdout, stderr io.Writer, r io.Reader) error {
	return demux(stdout, stderr, r, func(b []byte) error {
		return fmt.Errorf("the engine reports: %s", b)
	})
}

func demux(stdout, stderr io.Writer, r io.Reader, control func([]byte) error) error {
	if stdout == nil {
		stdout = io.Discard
	}
	if stderr == nil {
		stderr = io.Discard
	}
	var buf []byte
	var h [8]byte
	for {
		if _, err := io.ReadFull(r, h[:]); err != nil {
			if err == io.ErrUnexpectedEOF {
				return ErrConnectionLost
			}
			if err == io.EOF {
				return nil
			}
			return err
		}
		n := int64(binary.BigEndian.Uint32(h[4:]))
		var w io.Writer
		switch h[0] {
		case frameStdin, frameStdout:
			w = stdout
		case frameStderr:
			w = stderr
		case frameControl:
			if n > maxControl {
				return fmt.Errorf("the stream has a control frame of %d bytes", n)
			}
			b := make([]byte, n)
			if _, err := io.ReadFull(r, b); err != nil {
				return ErrConnectionLost
			}
			if err := control(b); err != nil {
				return err
			}
			continue
		default:
			return fmt.Errorf("the stream has a frame of unknown type %d", h[0])
		}
		if buf == nil {
			buf = make([]byte, 32<<10)
		}
		for n > 0 {
			p := buf
			if int64(len(p)) > n {
				p = p[:n]
			}
			m, err := r.Read(p)
			if m > 0 {
				n -= int64(m)
				if _, werr := w.Write(p[:m]); werr != nil {
					return &WriteError{werr}
				}
			}
			if err == io.EOF && n > 0 {
				return ErrConnectionLost
			}
			if err != nil && n > 0 {
				return err
			}
		}
	}
}

// WriteError is the failure of a destination, not of the stream.
type WriteError struct{ Err error }

func (e *WriteError) Error() string { return "cannot write output: " + e.Err.Error() }
func (e *WriteError) Unwrap() error { return e.Err }
