package client

import (
	"bufio"
	"errors"
	"io"
	"strconv"
	"strings"
)

// exactly reads n bytes and calls fewer an error.
type exactly struct {
	r io.Reader
	n int64
}

func (e *exactly) Read(p []byte) (int, error) {
	if e.n == 0 {
		return 0, io.EOF
	}
	if int64(len(p)) > e.n {
		p = p[:e.n]
	}
	n, err := e.r.Read(p)
	e.n -= int64(n)
	if err == io.EOF && e.n > 0 {
		err = ErrConnectionLost
	} else if err == nil && e.n == 0 {
		err = io.EOF
	}
	return n, err
}

// chunked reads a chunked body (RFC 9112, 7.1); trailers are dropped.
type chunked struct {
	br   *bufio.Reader
	n    int64
	head bool // a chunk's data was read, its CRLF was not
	err  error
}

func (c *chunked) Read(p []byte) (int, error) {
	if c.err != nil {
		return 0, c.err
	}
	if len(p) == 0 {
		return 0, nil
	}
	if c.n == 0 {
		if c.err = c.next(); c.err != nil {
			return 0, c.err
		}
	}
	if int64(len(p)) > c.n {
		p = p[:c.n]
	}
	n, err := c.br.Read(p)
	c.n -= int64(n)
	if err == io.EOF {
		err = ErrConnectionLost
	}
	if c.n == 0 && err == nil {
		c.head = true
		// When the next chunk's header is here already, take it now: the end of
		// a body is then seen with its last data.
		if c.br.Buffered() >= 5 {
			if b, _ := c.br.Peek(5); string(b) == "\r\n0\r\n" {
				if c.err = c.next(); c.err != nil {
					return n, nil
				}
			}
		}
	}
	c.err = err
	return n, err
}

func (c *chunked) next() error {
	left := maxHeader
	if c.head {
		c.head = false
		if line, err := readLine(c.br, &left); err != nil || line != "" {
			return lost(err, "a malformed chunk")
		}
	}
	line, err := readLine(c.br, &left)
	if err != nil {
		return lost(err, "")
	}
	size, _, _ := strings.Cut(line, ";")
	n, err := strconv.ParseUint(strings.TrimSpace(size), 16, 63)
	if err != nil {
		return lost(nil, "a malformed chunk")
	}
	if n > 0 {
		c.n = int64(n)
		return nil
	}
	for {
		line, err := readLine(c.br, &left)
		if err != nil {
			return lost(err, "")
		}
		if line == "" {
			return io.EOF
		}
	}
}

func lost(err error, what string) error {
	if err == nil {
		return errors.New("the engine's answer has " + what)
	}
	if err == io.ErrUnexpectedEOF {
		return ErrConnectionLost
	}
	return err
}

// sendChunked streams a body.
func sendChunked(w io.Writer, r io.Reader) error {
	const room = 10 // for the chunk's size in hexadecimal and CRLF
	buf := make([]byte, room+64<<10+2)
	for {
		n, err := r.Read(buf[room : len(buf)-2])
		if n > 0 {
			h := strconv.AppendInt(make([]byte, 0, room), int64(n), 16)
			h = append(h, "\r\n"...)
			start := room - len(h)
			copy(buf[start:], h)
			copy(buf[room+n:], "\r\n")
			if _, werr := w.Write(buf[start : room+n+2]); werr != nil {
				return werr
			}
		}
		if err == io.EOF {
			_, err = io.WriteString(w, "0\r\n\r\n")
			return err
		}
		if err != nil {
			return &bodyError{err}
		}
	}
}

// bodyError is a failure to read what was to be sent.
type bodyError struct{ err error }

func (e *bodyError) Error() string { return e.err.Error() }
