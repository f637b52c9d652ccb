package dockerapi

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/websocket"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/internal/fault"
)

// process stands for a running process with its streams.
type process struct {
	in       bytes.Buffer
	inClosed chan struct{}
	out, err *io.PipeWriter
	at       Attached
	closed   chan struct{}
}

type stdin struct {
	p    *process
	mu   sync.Mutex
	once sync.Once
}

func (s *stdin) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.p.in.Write(b)
}

func (s *stdin) Close() error {
	s.once.Do(func() { close(s.p.inClosed) })
	return nil
}

func newProcess(terminal bool) *process {
	p := &process{inClosed: make(chan struct{}), closed: make(chan struct{})}
	or, ow := io.Pipe()
	p.out = ow
	p.at = Attached{Terminal: terminal, Stdin: &stdin{p: p}, Stdout: or}
	var er *io.PipeReader
	if !terminal {
		er, p.err = io.Pipe()
		p.at.Stderr = er
	}
	p.at.Close = sync.OnceValue(func() error {
		close(p.closed)
		_ = or.CloseWithError(io.EOF)
		if er != nil {
			_ = er.CloseWithError(io.EOF)
		}
		return nil
	})
	return p
}

func (p *process) exit() {
	p.out.Close()
	if p.err != nil {
		p.err.Close()
	}
}

// rawRequest sends a request that asks for the connection and reads the
// answer's header.
func rawRequest(t *testing.T, socket, method, path, body string, upgrade bool) (*net.UnixConn, *bufio.Reader, *http.Response) {
	t.Helper()
	c, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s HTTP/1.1\r\nHost: docker\r\nContent-Type: application/json\r\nContent-Length: %d\r\n", method, path, len(body))
	if upgrade {
		b.WriteString("Connection: Upgrade\r\nUpgrade: tcp\r\n")
	}
	b.WriteString("\r\n" + body)
	if _, err := io.WriteString(c, b.String()); err != nil {
		t.Fatal(err)
	}
	br := bufio.NewReader(c)
	resp, err := http.ReadResponse(br, &http.Request{Method: method})
	if err != nil {
		t.Fatal(err)
	}
	return c.(*net.UnixConn), br, resp
}

// readFrame reads one frame.
func readFrame(r io.Reader) (kind byte, payload string, err error) {
	var h [8]byte
	if _, err := io.ReadFull(r, h[:]); err != nil {
		return 0, "", err
	}
	b := make([]byte, binary.BigEndian.Uint32(h[4:]))
	_, err = io.ReadFull(r, b)
	return h[0], string(b), err
}

func wantFrame(t *testing.T, r io.Reader, kind byte, payload string) {
	t.Helper()
	k, p, err := readFrame(r)
	if err != nil || k != kind || p != payload {
		t.Fatalf("frame %d %q (%v), want %d %q", k, p, err, kind, payload)
	}
}

func wait(t *testing.T, c <-chan struct{}, what string) {
	t.Helper()
	select {
	case <-c:
	case <-time.After(10 * time.Second):
		t.Fatal("timeout: " + what)
	}
}

func TestAttach(t *testing.T) {
	for _, c := range []struct {
		name, path, body  string
		terminal, upgrade bool
		status            int
		contentType       string
	}{
		{"attach", "/containers/x/attach?stream=1&stdin=1&stdout=1&stderr=1", "", false, true, 101, contentTypeMultiplexed},
		{"attach 1.41", "/v1.41/containers/x/attach?stream=1&stdin=1&stdout=1&stderr=1", "", false, true, 101, contentTypeRaw},
		{"attach old", "/containers/x/attach?stream=1&stdin=1&stdout=1&stderr=1", "", false, false, 200, contentTypeRaw},
		{"attach terminal", "/containers/x/attach?stream=1&stdin=1&stdout=1", "", true, true, 101, contentTypeRaw},
		{"exec", "/exec/e/start", "{}", false, true, 101, contentTypeMultiplexed},
		{"exec old", "/exec/e/start", "{}", false, false, 200, contentTypeRaw},
		{"exec terminal", "/exec/e/start", `{"Tty":true}`, true, true, 101, contentTypeRaw},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newProcess(c.terminal)
			f := &fake{attached: func() Attached { return p.at }}
			socket, _ := serveFake(t, f)
			conn, br, resp := rawRequest(t, socket, "POST", c.path, c.body, c.upgrade)
			if resp.StatusCode != c.status || resp.Header.Get("Content-Type") != c.contentType {
				t.Fatalf("%d %s", resp.StatusCode, resp.Header)
			}
			io.WriteString(conn, "hello")
			p.out.Write([]byte("out"))
			if c.terminal {
				b := make([]byte, 3)
				if _, err := io.ReadFull(br, b); err != nil || string(b) != "out" {
					t.Fatalf("%q %v", b, err)
				}
			} else {
				wantFrame(t, br, frameStdout, "out")
				p.err.Write([]byte("err"))
				wantFrame(t, br, frameStderr, "err")
			}
			// The client's half-close reaches the process; output goes on.
			conn.CloseWrite()
			wait(t, p.inClosed, "input is not closed")
			if p.in.String() != "hello" {
				t.Fatalf("input is %q", p.in.String())
			}
			select {
			case <-p.closed:
				t.Fatal("a half-close ended the stream")
			case <-time.After(50 * time.Millisecond):
			}
			p.out.Write([]byte("more"))
			if !c.terminal {
				wantFrame(t, br, frameStdout, "more")
			}
			p.exit()
			rest, err := io.ReadAll(br)
			if err != nil || (c.terminal && string(rest) != "more") {
				t.Fatalf("rest %q, %v", rest, err)
			}
		})
	}
}

func TestClientLeaves(t *testing.T) {
	p := newProcess(false)
	f := &fake{attached: func() Attached { return p.at }}
	socket, _ := serveFake(t, f)
	conn, _, _ := rawRequest(t, socket, "POST", "/containers/x/attach?stream=1&stdin=1&stdout=1", "", true)
	conn.CloseWrite()
	wait(t, p.inClosed, "input is not closed")
	conn.Close()
	wait(t, p.closed, "the stream outlives its client")
}

func TestDetach(t *testing.T) {
	p := newProcess(true)
	f := &fake{attached: func() Attached { return p.at }}
	socket, _ := serveFake(t, f)
	conn, br, _ := rawRequest(t, socket, "POST", "/containers/x/attach?stream=1&stdin=1&stdout=1&detachKeys=ctrl-a,x", "", true)
	io.WriteString(conn, "ab\x01y\x01xz")
	if _, err := io.ReadAll(br); err != nil {
		t.Fatal(err)
	}
	wait(t, p.closed, "the stream goes on after the detach keys")
	if got := p.in.String(); got != "ab\x01y" {
		t.Fatalf("input is %q", got)
	}
	select {
	case <-p.inClosed:
		t.Fatal("detaching ended the process's input")
	default:
	}
}

// TestUnreadInput: what the client sent and nobody read must not turn the end
// of the output into a reset.
func TestUnreadInput(t *testing.T) {
	p := newProcess(false)
	p.at.Stdin = nil
	f := &fake{attached: func() Attached { return p.at }}
	socket, _ := serveFake(t, f)
	conn, br, _ := rawRequest(t, socket, "POST", "/containers/x/attach?stream=1&stdout=1", "", true)
	go io.WriteString(conn, strings.Repeat("x", 1<<16))
	p.out.Write([]byte("out"))
	p.exit()
	wantFrame(t, br, frameStdout, "out")
	if _, err := br.ReadByte(); err != io.EOF {
		t.Fatalf("got %v, want EOF", err)
	}
}

// TestPipelinedInput: input sent together with the request is not lost.
func TestPipelinedInput(t *testing.T) {
	p := newProcess(false)
	f := &fake{attached: func() Attached { return p.at }}
	socket, _ := serveFake(t, f)
	c, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	io.WriteString(c, "POST /containers/x/attach?stream=1&stdin=1 HTTP/1.1\r\nHost: d\r\nConnection: Upgrade\r\nUpgrade: tcp\r\nContent-Length: 0\r\n\r\nearly")
	c.(*net.UnixConn).CloseWrite()
	wait(t, p.inClosed, "input is not closed")
	if p.in.String() != "early" {
		t.Fatalf("input is %q", p.in.String())
	}
	p.exit()
}

func TestExecErrors(t *testing.T) {
	f := &fake{err: fault.New(fault.Conflict, "container is paused")}
	socket, _ := serveFake(t, f)
	_, _, resp := rawRequest(t, socket, "POST", "/exec/e/start", "{}", true)
	if resp.StatusCode != 409 {
		t.Fatalf("status %d", resp.StatusCode)
	}
	f.err = fault.New(fault.Invalid, `exec: "nosuch": executable file not found in $PATH`)
	_, br, resp := rawRequest(t, socket, "POST", "/exec/e/start", "{}", true)
	if resp.StatusCode != 101 {
		t.Fatalf("status %d", resp.StatusCode)
	}
	wantFrame(t, br, frameStdout, f.err.Error()+"\r\n")
	if _, err := br.ReadByte(); err != io.EOF {
		t.Fatal(err)
	}
	_, _, resp = rawRequest(t, socket, "POST", "/exec/e/start", `{"Detach":true}`, false)
	if resp.StatusCode != 400 {
		t.Fatalf("detached: status %d", resp.StatusCode)
	}
}

func TestWebsocket(t *testing.T) {
	p := newProcess(false)
	f := &fake{attached: func() Attached { return p.at }}
	socket, _ := serveFake(t, f)
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	conf, err := websocket.NewConfig("ws://docker/containers/x/attach/ws?stream=1&stdin=1&stdout=1&stderr=1", "http://docker")
	if err != nil {
		t.Fatal(err)
	}
	ws, err := websocket.NewClient(conf, conn)
	if err != nil {
		t.Fatal(err)
	}
	_ = ws.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := ws.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	p.err.Write([]byte("err"))
	var got []byte
	if err := websocket.Message.Receive(ws, &got); err != nil || string(got) != "err" {
		t.Fatalf("%q %v", got, err)
	}
	ws.Close()
	wait(t, p.closed, "the stream outlives the websocket")
	if p.in.String() != "hello" {
		t.Fatalf("input is %q", p.in.String())
	}
}

func runFrames(t *testing.T, br io.Reader) (started api.RunStarted) {
	t.Helper()
	k, s, err := readFrame(br)
	if err != nil || k != frameSystem {
		t.Fatalf("%d %q %v", k, s, err)
	}
	if err := json.Unmarshal([]byte(s), &started); err != nil {
		t.Fatal(err)
	}
	return started
}

func TestRun(t *testing.T) {
	p := newProcess(false)
	f := &fake{attached: func() Attached { return p.at }, wait: make(chan container.WaitResponse, 1)}
	socket, _ := serveFake(t, f)
	body := js(api.RunRequest{Name: "web", Config: &container.Config{Image: "busybox", Labels: map[string]string{api.LabelPublishThrough: "true"}},
		HostConfig: &container.HostConfig{AutoRemove: true}, Stdin: true, Stdout: true, Stderr: true})
	conn, br, resp := rawRequest(t, socket, "POST", "/servin/run", body, true)
	if resp.StatusCode != 101 {
		t.Fatalf("status %d", resp.StatusCode)
	}
	if s := runFrames(t, br); s.ID != "c0ffee" || len(s.Warnings) != 1 {
		t.Fatalf("%+v", s)
	}
	for _, want := range []string{`"Name":"web"`, `"NetworkMode":"bridge"`, `"AutoRemove":true`, `"PublishThrough":true`, `"Stdin":true,"Stdout":true,"Stderr":true,"Stream":true`} {
		if !strings.Contains(f.last(), want) {
			t.Errorf("backend saw %s, want %s", f.last(), want)
		}
	}
	io.WriteString(conn, "in")
	conn.CloseWrite()
	wait(t, p.inClosed, "input is not closed")
	p.out.Write([]byte("out"))
	wantFrame(t, br, frameStdout, "out")
	p.exit()
	f.wait <- container.WaitResponse{StatusCode: 3}
	wantFrame(t, br, frameSystem, `{"ExitCode":3}`)
	if _, err := br.ReadByte(); err != io.EOF {
		t.Fatal(err)
	}
}

func TestRunFails(t *testing.T) {
	f := &fake{err: fault.WithExitCode(127, fault.New(fault.Invalid, "no such file"))}
	socket, _ := serveFake(t, f)
	_, br, _ := rawRequest(t, socket, "POST", "/servin/run", `{"Config":{"Image":"x"}}`, true)
	if s := runFrames(t, br); s.Error != "no such file" || s.Status != 400 || s.ExitCode != 127 {
		t.Fatalf("%+v", s)
	}
	if _, err := br.ReadByte(); err != io.EOF {
		t.Fatal(err)
	}
}

// TestExecInOne: the frames of a run, of an exec.
func TestExecInOne(t *testing.T) {
	p := newProcess(false)
	f := &fake{attached: func() Attached { return p.at }, wait: make(chan container.WaitResponse, 1)}
	socket, _ := serveFake(t, f)
	_, br, _ := rawRequest(t, socket, "POST", "/servin/containers/web/exec", `{"Cmd":["ls","-l"],"User":"u","AttachStdout":true}`, true)
	if s := runFrames(t, br); s.ID != "e4ec" || s.Error != "" {
		t.Fatalf("%+v", s)
	}
	if got := f.last(); !strings.HasPrefix(got, "exec web ") || !strings.Contains(got, `"Cmd":["ls","-l"]`) {
		t.Errorf("backend saw %s", got)
	}
	p.out.Write([]byte("out"))
	wantFrame(t, br, frameStdout, "out")
	p.exit()
	f.wait <- container.WaitResponse{StatusCode: 3}
	wantFrame(t, br, frameSystem, `{"ExitCode":3}`)

	f.err = fault.WithExitCode(127, fault.New(fault.Invalid, "no such file"))
	_, br, _ = rawRequest(t, socket, "POST", "/servin/containers/web/exec", `{"Cmd":["ls"]}`, true)
	if s := runFrames(t, br); s.Error != "no such file" || s.Status != 400 || s.ExitCode != 127 || s.ID != "e4ec" {
		t.Fatalf("%+v", s)
	}
}

func TestRunDetach(t *testing.T) {
	p := newProcess(true)
	f := &fake{attached: func() Attached { return p.at }, wait: make(chan container.WaitResponse)}
	socket, _ := serveFake(t, f)
	conn, br, _ := rawRequest(t, socket, "POST", "/servin/run", `{"Config":{"Image":"x","Tty":true},"Stdin":true,"Stdout":true}`, true)
	runFrames(t, br)
	io.WriteString(conn, "\x10\x11")
	wantFrame(t, br, frameSystem, `{"ExitCode":0,"Detached":true}`)
}

// TestRunWithoutStreams is run -d: the exit is told to who stays, and a client
// that leaves ends nothing but its connection.
func TestRunWithoutStreams(t *testing.T) {
	ended := make(chan struct{})
	f := &fake{attached: func() Attached {
		return Attached{Close: sync.OnceValue(func() error { close(ended); return nil })}
	}, wait: make(chan container.WaitResponse, 1)}
	socket, _ := serveFake(t, f)
	conn, br, _ := rawRequest(t, socket, "POST", "/servin/run", `{"Config":{"Image":"x"}}`, true)
	runFrames(t, br)
	conn.CloseWrite()
	f.wait <- container.WaitResponse{StatusCode: 4}
	wantFrame(t, br, frameSystem, `{"ExitCode":4}`)
	wait(t, ended, "streams stay open")

	ended = make(chan struct{})
	conn, br, _ = rawRequest(t, socket, "POST", "/servin/run", `{"Config":{"Image":"x"}}`, true)
	runFrames(t, br)
	conn.Close()
	wait(t, ended, "streams outlive their client")
}

func get(t *testing.T, c *http.Client, path string) (*http.Response, string, error) {
	t.Helper()
	resp, err := c.Get("http://docker" + path)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return resp, string(b), err
}

func TestLogs(t *testing.T) {
	const stamp = "2024-05-06T07:08:09.000000010Z "
	for _, c := range []struct {
		name, path string
		tty        bool
		late       error
		want       string
		ct         string
	}{
		{"framed", "/containers/x/logs?stdout=1", false, nil, "\x01\x00\x00\x00\x00\x00\x00\x04out\n\x02\x00\x00\x00\x00\x00\x00\x04err\n", contentTypeMultiplexed},
		{"old", "/v1.41/containers/x/logs?stdout=1&follow=1", false, nil, "\x01\x00\x00\x00\x00\x00\x00\x04out\n\x02\x00\x00\x00\x00\x00\x00\x04err\n", contentTypeRaw},
		{"terminal", "/containers/x/logs?stdout=1&timestamps=1", true, nil, stamp + "out\n" + stamp + "err\n", contentTypeRaw},
		{"details", "/containers/x/logs?stdout=1&details=1", true, nil, "k=v+w out\n err\n", contentTypeRaw},
		{"late error", "/containers/x/logs?stdout=1", true, errors.New("broken"), "out\nerr\nError grabbing logs: broken\n", contentTypeRaw},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, client := serveFake(t, &fake{terminal: c.tty, late: c.late})
			resp, body, err := get(t, client, c.path)
			if err != nil || body != c.want || resp.Header.Get("Content-Type") != c.ct {
				t.Errorf("%q %s %v, want %q %s", body, resp.Header.Get("Content-Type"), err, c.want, c.ct)
			}
		})
	}
}

func TestLateErrors(t *testing.T) {
	f := &fake{late: errors.New("broken")}
	_, client := serveFake(t, f)
	for _, path := range []string{"/containers/x/export", "/images/x/get"} {
		resp, err := client.Get("http://docker" + path)
		if err != nil {
			continue // cut before the header left
		}
		b, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err == nil {
			t.Errorf("%s: a broken stream looks complete: %q", path, b)
		}
	}
	resp, err := client.Post("http://docker/images/create?fromImage=busybox&tag=latest", "", nil)
	if err != nil {
		t.Fatal(err)
	}
	b, _ := io.ReadAll(resp.Body)
	resp.Body.Close()
	want := `{"status":"Pulling from library/busybox","id":"latest"}` + "\r\n" +
		`{"status":"Downloading","progressDetail":{"current":50,"total":100},"id":"abc"}` + "\r\n" +
		`{"errorDetail":{"message":"broken"},"error":"broken"}` + "\r\n"
	if resp.StatusCode != 200 || string(b) != want {
		t.Errorf("%d %q, want %q", resp.StatusCode, b, want)
	}
	f.err = fault.New(fault.NotFound, "no such image")
	resp, err = client.Post("http://docker/images/create?fromImage=busybox&tag=latest", "", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != 404 {
		t.Errorf("an error before the stream: status %d", resp.StatusCode)
	}
}

func TestWaitSendsHeaderFirst(t *testing.T) {
	f := &fake{wait: make(chan container.WaitResponse, 1)}
	_, client := serveFake(t, f)
	resp, err := client.Post("http://docker/containers/x/wait", "", nil) // returns with the header
	if err != nil {
		t.Fatal(err)
	}
	f.wait <- container.WaitResponse{StatusCode: 2, Error: &container.WaitExitError{Message: "oops"}}
	b, _ := io.ReadAll(resp.Body)
	resp.Body.Close()
	if trim(b) != `{"Error":{"Message":"oops"},"StatusCode":2}` {
		t.Errorf("got %s", b)
	}
}

func TestEvents(t *testing.T) {
	f := &fake{events: []events.Message{
		{Type: events.ContainerEventType, Action: events.ActionStart, Actor: events.Actor{ID: "c0ffee", Attributes: map[string]string{"image": "busybox"}}, Scope: "local"},
		{Type: events.ImageEventType, Action: events.ActionCreate},
	}}
	_, client := serveFake(t, f)
	for _, c := range []struct{ path, accept, ct, want string }{
		{"/events?until=1", "", typeJSONLines, `{"Type":"container","Action":"start","Actor":{"ID":"c0ffee","Attributes":{"image":"busybox"}},"scope":"local"}` + "\n" + `{"Type":"image","Action":"create","Actor":{"ID":"","Attributes":null}}` + "\n"},
		{"/v1.45/events?until=1", "", "application/json", `{"status":"start","id":"c0ffee","from":"busybox","Type":"container","Action":"start","Actor":{"ID":"c0ffee","Attributes":{"image":"busybox"}},"scope":"local"}` + "\n"},
		{"/events?until=1", "text/plain, application/json-seq;q=1", typeJSONSeq, "\x1e" + `{"Type":"container"`},
	} {
		req, _ := http.NewRequest("GET", "http://docker"+c.path, nil)
		if c.accept != "" {
			req.Header.Set("Accept", c.accept)
		}
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		b, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if !strings.HasPrefix(string(b), c.want) || resp.Header.Get("Content-Type") != c.ct {
			t.Errorf("%s: %s %q, want %s %q", c.path, resp.Header.Get("Content-Type"), b, c.ct, c.want)
		}
	}
}
