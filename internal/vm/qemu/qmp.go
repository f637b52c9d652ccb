package qemu

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// maxLine bounds a message of QEMU's monitor.
const maxLine = 4 << 20

// monitor is a conversation with QEMU's monitor (QMP). QEMU serves one at a time.
type monitor struct {
	conn net.Conn
	done chan struct{} // closed when the conversation has ended

	mu      sync.Mutex
	next    uint64
	waiting map[uint64]chan reply
	events  map[string]json.RawMessage // the last of each name
	err     error
}

// message is whatever QEMU sends: its greeting, an answer or an event.
type message struct {
	QMP    json.RawMessage `json:"QMP"`
	ID     *uint64         `json:"id"`
	Return json.RawMessage `json:"return"`
	Error  *monitorError   `json:"error"`
	Event  string          `json:"event"`
	Data   json.RawMessage `json:"data"`
}

type reply struct {
	value json.RawMessage
	err   error
}

// monitorError is a command that QEMU refused.
type monitorError struct {
	Class string `json:"class"`
	Desc  string `json:"desc"`
}

func (e *monitorError) Error() string { return "qemu refuses: " + e.Desc }

// parseMessage reads one line of the monitor.
func parseMessage(line []byte) (message, error) {
	var m message
	if err := json.Unmarshal(line, &m); err != nil {
		return m, fmt.Errorf("cannot read an answer of qemu's monitor: %w", err)
	}
	return m, nil
}

// converse begins a conversation over conn, within the context's time.
func converse(ctx context.Context, conn net.Conn) (*monitor, error) {
	m := &monitor{conn: conn, done: make(chan struct{}), waiting: map[uint64]chan reply{}, events: map[string]json.RawMessage{}}
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	r := bufio.NewReaderSize(conn, 16<<10)
	line, err := readLine(r)
	if err == nil {
		var g message
		if g, err = parseMessage(line); err == nil && g.QMP == nil {
			err = errors.New("qemu's monitor did not greet")
		}
	}
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("cannot speak to qemu: %w", errors.Join(err, ctx.Err()))
	}
	go m.read(r)
	if err := m.do(ctx, "qmp_capabilities", nil, nil); err != nil {
		m.close()
		return nil, err
	}
	return m, nil
}

func readLine(r *bufio.Reader) ([]byte, error) {
	var line []byte
	for {
		part, err := r.ReadSlice('\n')
		line = append(line, part...)
		if len(line) > maxLine {
			return nil, errors.New("a line of qemu's monitor is too long")
		}
		if err == nil {
			return line, nil
		}
		if err != bufio.ErrBufferFull {
			return nil, err
		}
	}
}

func (m *monitor) read(r *bufio.Reader) {
	var err error
	for {
		var line []byte
		var msg message
		if line, err = readLine(r); err != nil {
			break
		}
		if msg, err = parseMessage(line); err != nil {
			break
		}
		m.mu.Lock()
		switch {
		case msg.Event != "":
			if len(m.events) < 256 {
				m.events[msg.Event] = msg.Data
			}
		case msg.ID != nil:
			if c := m.waiting[*msg.ID]; c != nil {
				delete(m.waiting, *msg.ID)
				if msg.Error != nil {
					c <- reply{err: msg.Error}
				} else {
					c <- reply{value: msg.Return}
				}
			}
		}
		m.mu.Unlock()
	}
	m.conn.Close()
	m.mu.Lock()
	if err == io.EOF {
		err = errors.New("qemu ended the conversation")
	}
	m.err = err
	for id, c := range m.waiting {
		delete(m.waiting, id)
		c <- reply{err: err}
	}
	m.mu.Unlock()
	close(m.done)
}

// do runs a command and decodes its answer into out.
func (m *monitor) do(ctx context.Context, command string, args, out any) error {
	c := make(chan reply, 1)
	m.mu.Lock()
	if m.err != nil {
		m.mu.Unlock()
		return m.err
	}
	m.next++
	id := m.next
	m.waiting[id] = c
	m.mu.Unlock()
	raw, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
		ID        uint64 `json:"id"`
	}{command, args, id})
	if err == nil {
		_, err = m.conn.Write(append(raw, '\n'))
	}
	if err != nil {
		m.mu.Lock()
		delete(m.waiting, id)
		m.mu.Unlock()
		return fmt.Errorf("cannot ask qemu to %s: %w", command, err)
	}
	select {
	case r := <-c:
		if r.err != nil {
			return fmt.Errorf("cannot %s: %w", command, r.err)
		}
		if out == nil {
			return nil
		}
		return json.Unmarshal(r.value, out)
	case <-ctx.Done():
		m.mu.Lock()
		delete(m.waiting, id)
		m.mu.Unlock()
		return fmt.Errorf("qemu does not answer to %s: %w", command, ctx.Err())
	}
}

// event tells whether an event came, with its data.
func (m *monitor) event(name string) (json.RawMessage, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	d, ok := m.events[name]
	return d, ok
}

func (m *monitor) close() { m.conn.Close(); <-m.done }
