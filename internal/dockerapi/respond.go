package dockerapi

import (
	"bufio"
	"bytes"
	"encoding/json"
	"net"
	"net/http"
	"strconv"
	"sync"
	"time"

	"github.com/cloudos-io/cloudos/internal/audit"
)

// response is a ResponseWriter that knows whether it has begun.
type response struct {
	http.ResponseWriter
	began    bool
	hijacked bool
	entry    *audit.Entry // what must be on the disk before the first byte goes out
	status   int
}

// begin comes before the first byte.
func (w *response) begin(status int) {
	if !w.began {
		w.began, w.status = true, status
		w.entry.Durable()
	}
}

// Unwrap lets http.ResponseController find the connection.
func (w *response) Unwrap() http.ResponseWriter { return w.ResponseWriter }

func (w *response) WriteHeader(status int) {
	w.begin(status)
	w.ResponseWriter.WriteHeader(status)
}

func (w *response) Write(p []byte) (int, error) {
	w.begin(http.StatusOK)
	return w.ResponseWriter.Write(p)
}

// Flush sends what is buffered.
func (w *response) Flush() {
	w.begin(http.StatusOK)
	_ = http.NewResponseController(w.ResponseWriter).Flush()
}

// Hijack takes the connection over.
func (w *response) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	if !w.began {
		w.entry.Durable()
	}
	c, brw, err := http.NewResponseController(w.ResponseWriter).Hijack()
	if err == nil {
		w.began, w.hijacked, w.status = true, true, http.StatusSwitchingProtocols
	}
	return c, brw, err
}

var buffers = sync.Pool{New: func() any { return new(bytes.Buffer) }}

// keepBuffer bounds what the pool may hold on to.
const keepBuffer = 256 << 10

// json writes v in one piece with its length, so that no chunking is needed.
func (w *response) json(status int, v any) error {
	buf := buffers.Get().(*bytes.Buffer)
	defer func() {
		if buf.Cap() <= keepBuffer {
			buf.Reset()
			buffers.Put(buf)
		}
	}()
	enc := json.NewEncoder(buf)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return err
	}
	h := w.Header()
	h["Content-Type"] = headerJSON
	h["Content-Length"] = []string{strconv.Itoa(buf.Len())}
	w.WriteHeader(status)
	_, err := w.Write(buf.Bytes())
	return err
}

// listPiece is how much of a list is sent at a time: the client reads while the
// rest is encoded, and no buffer has the size of the list.
const listPiece = 64 << 10

// jsonList writes a list. A short one goes out in one piece with its length.
func jsonList[T any](w *response, status int, l []T) error {
	buf := buffers.Get().(*bytes.Buffer)
	defer func() {
		if buf.Cap() <= keepBuffer {
			buf.Reset()
			buffers.Put(buf)
		}
	}()
	enc := json.NewEncoder(buf)
	enc.SetEscapeHTML(false)
	h := w.Header()
	h["Content-Type"] = headerJSON
	buf.WriteByte('[')
	for i := range l {
		if i > 0 {
			buf.Truncate(buf.Len() - 1) // the encoder's newline
			buf.WriteByte(',')
		}
		if err := enc.Encode(&l[i]); err != nil {
			return err
		}
		if buf.Len() < listPiece || i == len(l)-1 {
			continue
		}
		if !w.began {
			w.WriteHeader(status)
		}
		last := buf.Len() - 1
		if _, err := w.Write(buf.Bytes()[:last]); err != nil {
			return err
		}
		buf.Reset()
		buf.WriteByte('\n') // stands for the newline that was not sent
	}
	if len(l) > 0 {
		buf.Truncate(buf.Len() - 1)
	}
	buf.WriteString("]\n")
	if !w.began {
		h["Content-Length"] = []string{strconv.Itoa(buf.Len())}
		w.WriteHeader(status)
	}
	_, err := w.Write(buf.Bytes())
	return err
}

func (w *response) noContent() error {
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// stream is a response whose header waits for the first byte, so that an error
// before it still becomes a proper status, but not longer than the patience:
// clients take the header for "the stream stands". Safe for concurrent use.
type stream struct {
	mu     sync.Mutex
	w      *response
	timer  *time.Timer
	ended  bool
	header http.Header // set before the first byte goes out
}

// newStream begins a stream of the content type. A patience of 0 waits for the
// first byte for ever. The caller must call end.
func newStream(w *response, contentType string, patience time.Duration) *stream {
	s := &stream{w: w, header: http.Header{"Content-Type": {contentType}}}
	if patience > 0 {
		s.timer = time.AfterFunc(patience, s.begin)
	}
	return s
}

func (s *stream) begin() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.ended && s.start() {
		s.w.Flush()
	}
}

// start sends the header if it was not sent; it tells whether it did.
func (s *stream) start() bool {
	if s.w.began {
		return false
	}
	h := s.w.Header()
	for k, v := range s.header {
		h[k] = v
	}
	s.w.WriteHeader(http.StatusOK)
	return true
}

// Write writes without flushing.
func (s *stream) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.start()
	return s.w.Write(p)
}

// send writes p and flushes.
func (s *stream) send(p []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.start()
	_, err := s.w.Write(p)
	s.w.Flush()
	return err
}

// begun tells whether the header is out.
func (s *stream) begun() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.w.began
}

// end stops the timer. After it returns nothing else writes to the response.
func (s *stream) end() {
	if s.timer != nil {
		s.timer.Stop()
	}
	s.mu.Lock()
	s.ended = true
	s.mu.Unlock()
}

// encodeLine is v as one line of JSON.
func encodeLine(v any) ([]byte, error) {
	var buf bytes.Buffer
	enc := json.NewEncoder(&buf)
	enc.SetEscapeHTML(false)
	err := enc.Encode(v)
	return buf.Bytes(), err
}
