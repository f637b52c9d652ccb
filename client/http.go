package client

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"
)

const (
	maxHeader    = 64 << 10 // of a response, in bytes
	maxErrorBody = 1 << 20
	maxIdle      = 4
)

// conn is a connection that HTTP exchanges run over, one at a time.
type conn struct {
	net.Conn
	br     *bufio.Reader
	reused bool
}

// header is a response's header, names in lower case.
type header map[string]string

// response is an answer whose body has not been read.
type response struct {
	status int
	header header
	body   io.ReadCloser
	conn   *conn
}

// request is what send sends.
type request struct {
	method, path string
	query        url.Values
	header       map[string]string
	// json is marshalled as the body; body streams one (chunked).
	json any
	raw  []byte // a body in whole, with contentType
	body io.Reader
	// contentType of raw or body.
	contentType string
	// upgrade asks for a raw stream.
	upgrade bool
	// bare: the path has no version before it.
	bare bool
}

// head renders the request line and header.
func (c *Client) head(r *request, bodyLen int) []byte {
	b := make([]byte, 0, 512)
	b = append(b, r.method...)
	b = append(b, ' ')
	if !r.bare && !strings.HasPrefix(r.path, "/servin/") {
		b = append(append(b, "/v"...), c.version...)
	}
	b = append(b, r.path...)
	if len(r.query) > 0 {
		b = append(b, '?')
		b = append(b, r.query.Encode()...)
	}
	b = append(b, " HTTP/1.1\r\nHost: "...)
	b = append(b, c.authority...)
	b = append(b, "\r\nUser-Agent: "...)
	b = append(b, c.agent...)
	for _, m := range []map[string]string{c.headers, r.header} {
		for k, v := range m {
			b = append(b, "\r\n"...)
			b = append(b, cleanHeader(k)...)
			b = append(b, ": "...)
			b = append(b, cleanHeader(v)...)
		}
	}
	if r.contentType != "" {
		b = append(b, "\r\nContent-Type: "...)
		b = append(b, r.contentType...)
	}
	if r.upgrade {
		b = append(b, "\r\nConnection: Upgrade\r\nUpgrade: tcp"...)
	}
	switch {
	case r.body != nil:
		b = append(b, "\r\nTransfer-Encoding: chunked"...)
	case bodyLen > 0 || r.method == "POST" || r.method == "PUT":
		b = append(b, "\r\nContent-Length: "...)
		b = strconv.AppendInt(b, int64(bodyLen), 10)
	}
	return append(b, "\r\n\r\n"...)
}

// cleanHeader keeps a value from ending its line.
func cleanHeader(s string) string {
	if strings.ContainsAny(s, "\r\n\x00") {
		return strings.NewReplacer("\r", "", "\n", "", "\x00", "").Replace(s)
	}
	return s
}

// send does one exchange up to the response's header. A status of 400 or more
// comes back as an *Error. The caller closes the body (stop ends the watch on
// ctx and must be called when the body is done with; body.Close does it).
func (c *Client) send(ctx context.Context, r *request) (*response, error) {
	if r.json != nil {
		raw, err := encodeBody(r.json)
		if err != nil {
			return nil, fmt.Errorf("cannot encode the request: %w", err)
		}
		r.raw, r.contentType = raw, "application/json"
	}
	msg := append(c.head(r, len(r.raw)), r.raw...)
	for {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		k, err := c.get(ctx, r.body != nil || r.upgrade)
		if err != nil {
			return nil, ctxErr(ctx, err)
		}
		resp, err := c.exchange(ctx, k, r, msg)
		if err == nil {
			return resp, nil
		}
		if k.reused && errors.Is(err, errStale) {
			continue // the engine had closed an idle connection; nothing was asked
		}
		return nil, ctxErr(ctx, err)
	}
}

// errStale says that a kept connection was dead before the request went out.
var errStale = errors.New("connection closed while idle")

func (c *Client) exchange(ctx context.Context, k *conn, r *request, msg []byte) (*response, error) {
	stop := watch(ctx, k)
	fail := func(err error) error {
		stop()
		k.Close()
		return err
	}
	if _, err := k.Write(msg); err != nil && r.body == nil {
		// The engine may have answered before it closed; an answer wins.
		if _, perr := k.br.Peek(1); perr != nil {
			if k.reused {
				return nil, fail(errStale)
			}
			return nil, fail(fmt.Errorf("%w: %w", ErrConnectionLost, err))
		}
	}
	var sent chan error
	if r.body != nil {
		sent = make(chan error, 1)
		go func() {
			err := sendChunked(k, r.body)
			sent <- err
			if err != nil {
				// Cut it off: the engine must not take half for the whole.
				k.SetWriteDeadline(time.Unix(1, 0))
				if cw, ok := k.Conn.(interface{ CloseWrite() error }); ok {
					cw.CloseWrite()
				}
			}
		}()
	}
	_, err := k.br.Peek(1)
	if sent != nil {
		// What broke the body comes before what the engine made of half of it.
		select {
		case serr := <-sent:
			var be *bodyError
			if errors.As(serr, &be) {
				return nil, fail(be.err)
			}
			if serr != nil && err != nil {
				return nil, fail(serr)
			}
		default:
		}
	}
	if err != nil {
		if err == io.EOF || errors.Is(err, errReset) {
			if k.reused {
				return nil, fail(errStale)
			}
			err = ErrConnectionLost
		}
		var alert tls.AlertError
		if errors.As(err, &alert) { // TLS 1.3 refuses a client's certificate this late
			err = &ConnectError{Host: c.host, Err: err}
		}
		return nil, fail(err)
	}
	resp, err := readResponse(k, r.method)
	if err != nil {
		return nil, fail(err)
	}
	resp.conn = k
	if resp.status == 101 {
		stop()
		return resp, nil
	}
	keep := sent == nil && !r.upgrade && resp.header["connection"] != "close" && resp.header["content-type"] != mediaRaw && resp.header["content-type"] != mediaMultiplexed
	resp.body = &body{Reader: resp.body, ctx: ctx, stop: stop, k: k, c: c, keep: keep}
	if resp.status >= 400 || resp.status == 304 {
		defer resp.body.Close()
		return nil, readError(resp)
	}
	return resp, nil
}

// readError makes an *Error of an answer.
func readError(resp *response) error {
	b, _ := io.ReadAll(io.LimitReader(resp.body, maxErrorBody))
	e := &Error{Status: resp.status}
	var m struct {
		Message  string `json:"message"`
		ExitCode int
	}
	if json.Unmarshal(b, &m) == nil {
		e.Message, e.ExitCode = m.Message, m.ExitCode
	} else {
		e.Message = string(bytes.TrimSpace(b))
	}
	return e
}

// get returns an idle connection or a fresh one.
func (c *Client) get(ctx context.Context, fresh bool) (*conn, error) {
	if !fresh {
		c.mu.Lock()
		if n := len(c.idle); n > 0 {
			k := c.idle[n-1]
			c.idle = c.idle[:n-1]
			c.mu.Unlock()
			k.reused = true
			return k, nil
		}
		c.mu.Unlock()
	}
	nc, err := c.dial(ctx)
	if err != nil {
		return nil, err
	}
	return &conn{Conn: nc, br: bufio.NewReaderSize(nc, 8<<10)}, nil
}

func (c *Client) put(k *conn) {
	c.mu.Lock()
	if !c.closed && len(c.idle) < maxIdle {
		c.idle = append(c.idle, k)
		k = nil
	}
	c.mu.Unlock()
	if k != nil {
		k.Close()
	}
}

// watch cuts the connection when ctx ends. The returned function ends the
// watch; it is safe to call twice.
func watch(ctx context.Context, k net.Conn) func() bool {
	if ctx.Done() == nil {
		return func() bool { return true }
	}
	return context.AfterFunc(ctx, func() { k.SetDeadline(time.Unix(1, 0)) })
}

// ctxErr prefers the context's error: it is the cause of whatever broke.
func ctxErr(ctx context.Context, err error) error {
	if cerr := ctx.Err(); cerr != nil && err != nil && !errors.Is(err, cerr) {
		if errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, net.ErrClosed) {
			return cerr
		}
	}
	return err
}

// body is a response's body; closing it gives the connection back when it was
// read to its end.
type body struct {
	io.Reader
	ctx  context.Context
	stop func() bool
	k    *conn
	c    *Client
	keep bool
	eof  bool
	done bool
}

func (b *body) Read(p []byte) (int, error) {
	if b.done {
		return 0, net.ErrClosed
	}
	n, err := b.Reader.Read(p)
	if err == io.EOF {
		b.eof = true
	} else if err != nil {
		err = ctxErr(b.ctx, err)
	}
	return n, err
}

func (b *body) Close() error {
	if b.done {
		return nil
	}
	if b.keep && !b.eof && b.k.br.Buffered() > 0 {
		// Most often only the end mark is unread. More is not waited for.
		var one [1]byte
		if n, err := b.Read(one[:]); n != 0 || err != io.EOF {
			b.keep = false
		}
	}
	b.done = true
	if !b.stop() {
		b.keep = false // the deadline has been or is being set
	}
	if b.keep && b.eof {
		b.c.put(b.k)
		return nil
	}
	return b.k.Close()
}

// readResponse parses the status line and header, skipping 1xx but 101.
func readResponse(k *conn, method string) (*response, error) {
	for {
		left := maxHeader
		line, err := readLine(k.br, &left)
		if err != nil {
			return nil, err
		}
		proto, rest, ok := strings.Cut(line, " ")
		code, _, _ := strings.Cut(rest, " ")
		status, aerr := strconv.Atoi(code)
		if !ok || !strings.HasPrefix(proto, "HTTP/1.") || aerr != nil || status < 100 || status > 999 {
			return nil, errors.New("the answer is not HTTP: is this address an engine's?")
		}
		h := header{}
		for {
			line, err := readLine(k.br, &left)
			if err != nil {
				return nil, err
			}
			if line == "" {
				break
			}
			name, value, ok := strings.Cut(line, ":")
			if !ok {
				return nil, errors.New("the engine's answer has a malformed header")
			}
			h[strings.ToLower(name)] = strings.TrimSpace(value)
		}
		if status >= 100 && status < 200 && status != 101 {
			continue
		}
		resp := &response{status: status, header: h}
		if proto == "HTTP/1.0" && h["connection"] == "" {
			h["connection"] = "close"
		}
		h["connection"] = strings.ToLower(h["connection"])
		switch {
		case method == "HEAD" || status == 204 || status == 304 || status == 101:
			resp.body = io.NopCloser(bytes.NewReader(nil))
		case strings.EqualFold(h["transfer-encoding"], "chunked"):
			resp.body = io.NopCloser(&chunked{br: k.br})
		case h["content-length"] != "":
			n, err := strconv.ParseInt(h["content-length"], 10, 64)
			if err != nil || n < 0 {
				return nil, errors.New("the engine's answer has a bad length")
			}
			resp.body = io.NopCloser(&exactly{r: k.br, n: n})
		default:
			h["connection"] = "close"
			resp.body = io.NopCloser(k.br)
		}
		return resp, nil
	}
}

// readLine reads a line without its end, counting against left.
func readLine(br *bufio.Reader, left *int) (string, error) {
	var long []byte
	for {
		part, err := br.ReadSlice('\n')
		if *left -= len(part); *left < 0 {
			return "", errors.New("the engine's answer has too long a header")
		}
		if err == bufio.ErrBufferFull {
			long = append(long, part...)
			continue
		}
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return "", err
		}
		if long != nil {
			part = append(long, part...)
		}
		return strings.TrimRight(string(part), "\r\n"), nil
	}
}
