package client_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/registry"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/client"
)

// engine serves a handler on a unix socket and gives a client for it.
func engine(t *testing.T, h http.HandlerFunc) (*client.Client, *httptest.Server) {
	t.Helper()
	sock := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	srv := &httptest.Server{Listener: &countingListener{Listener: l}, Config: &http.Server{Handler: h}}
	srv.Start()
	t.Cleanup(srv.Close)
	c, err := client.New(client.Config{Host: "unix://" + sock, UserAgent: "test", Headers: map[string]string{"X-Extra": "1\r\nX-Evil: 2"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c, srv
}

// countingListener counts connections.
type countingListener struct {
	net.Listener
	n atomic.Int32
}

func (l *countingListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err == nil {
		l.n.Add(1)
	}
	return c, err
}

func ctx(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func TestListAndHeaders(t *testing.T) {
	c, _ := engine(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("User-Agent") != "test" || r.Header.Get("X-Extra") != "1X-Evil: 2" || r.Header.Get("X-Evil") != "" {
			t.Errorf("header %v", r.Header)
		}
		if want := "/v" + client.APIVersion + "/containers/json"; r.URL.Path != want {
			t.Errorf("path %s, want %s", r.URL.Path, want)
		}
		if f := r.URL.Query().Get("filters"); f != `{"status":{"exited":true}}` {
			t.Errorf("filters %s", f)
		}
		json.NewEncoder(w).Encode([]container.Summary{{ID: "a", State: "exited"}})
	})
	l, err := c.ContainerList(ctx(t), client.ContainerListOptions{All: true, Filters: client.Filters{"status": {"exited"}}})
	if err != nil || len(l) != 1 || l[0].ID != "a" {
		t.Fatalf("%v, %v", l, err)
	}
}

// Bodies of every framing come through whole, and the connection is used again.
func TestFraming(t *testing.T) {
	big := strings.Repeat("x", 300_000)
	c, srv := engine(t, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Query().Get("size") {
		case "1":
			w.Header().Set("Content-Length", fmt.Sprint(len(big)+5))
		case "":
			w.(http.Flusher).Flush()
		}
		fmt.Fprintf(w, "[%q]\n", big)
	})
	for i := range 6 {
		l, err := client.ContainerListAs[json.RawMessage](ctx(t), c, client.ContainerListOptions{Size: i%2 == 0})
		if err != nil || len(l) != 1 || len(l[0]) != len(big)+2 {
			t.Fatalf("%d: %d, %v", i, len(l), err)
		}
	}
	if n := srv.Listener.(*countingListener).n.Load(); n > 3 {
		t.Errorf("%d connections for 6 requests", n)
	}
}

func TestErrors(t *testing.T) {
	status := 404
	c, _ := engine(t, func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(status)
		if status != 304 {
			io.WriteString(w, `{"message":"no such container: x"}`)
		}
	})
	_, _, err := c.ContainerInspect(ctx(t), "x", false)
	if !client.IsNotFound(fmt.Errorf("wrapped: %w", err)) || err.Error() != "no such container: x" {
		t.Error(err)
	}
	status = 304
	if err := c.ContainerStart(ctx(t), "x", ""); err != nil {
		t.Errorf("already started: %v", err)
	}
	status = 409
	if err := c.ContainerRemove(ctx(t), "x", client.RemoveOptions{}); !client.IsConflict(err) {
		t.Error(err)
	}
	if _, err := c.ContainerStatPath(ctx(t), "x", "/y"); client.Status(err) != 409 {
		t.Error(err)
	}
}

func TestConnectError(t *testing.T) {
	c, err := client.New(client.Config{Host: "unix:///nonexistent/socket"})
	if err != nil {
		t.Fatal(err)
	}
	var ce *client.ConnectError
	if err := c.Ping(ctx(t)); !errors.As(err, &ce) || !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}

// An engine that was restarted in between leaves a dead idle connection.
func TestStaleConnection(t *testing.T) {
	c, srv := engine(t, func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "OK") })
	for range 3 {
		if err := c.Ping(ctx(t)); err != nil {
			t.Fatal(err)
		}
		srv.CloseClientConnections()
	}
}

// The engine dies after it took a request: that is told, and not asked again.
func TestLost(t *testing.T) {
	var n atomic.Int32
	c, _ := engine(t, func(w http.ResponseWriter, r *http.Request) {
		n.Add(1)
		k, _, _ := w.(http.Hijacker).Hijack()
		k.Close()
	})
	if err := c.ContainerStop(ctx(t), "x", client.StopOptions{}); !errors.Is(err, client.ErrConnectionLost) {
		t.Error(err)
	}
	if n.Load() != 1 {
		t.Errorf("asked %d times", n.Load())
	}
}

func TestTruncated(t *testing.T) {
	for _, head := range []string{"Content-Length: 100\r\n\r\n[1,", "Transfer-Encoding: chunked\r\n\r\n5\r\n[1,", "Transfer-Encoding: chunked\r\n\r\nzz\r\n"} {
		c, _ := engine(t, func(w http.ResponseWriter, r *http.Request) {
			k, _, _ := w.(http.Hijacker).Hijack()
			io.WriteString(k, "HTTP/1.1 200 OK\r\n"+head)
			k.Close()
		})
		if _, err := c.NetworkList(ctx(t), nil); err == nil {
			t.Errorf("%q: no error", head)
		}
	}
}

func TestNotHTTP(t *testing.T) {
	for _, answer := range []string{"SSH-2.0-x\r\n\r\n", "HTTP/1.1 abc\r\n\r\n", "HTTP/1.1 200 OK\r\nbroken\r\n\r\n", "HTTP/1.1 200 OK\r\nA: " + strings.Repeat("x", 70_000) + "\r\n\r\n"} {
		c, _ := engine(t, func(w http.ResponseWriter, r *http.Request) {
			k, _, _ := w.(http.Hijacker).Hijack()
			io.WriteString(k, answer)
			k.Close()
		})
		if err := c.Ping(ctx(t)); err == nil {
			t.Errorf("%.20q: no error", answer)
		}
	}
}

func TestCancel(t *testing.T) {
	begun := make(chan struct{}, 1)
	c, _ := engine(t, func(w http.ResponseWriter, r *http.Request) {
		w.(http.Flusher).Flush()
		begun <- struct{}{}
		<-r.Context().Done()
	})
	cctx, cancel := context.WithCancel(context.Background())
	go func() { <-begun; cancel() }()
	if _, err := c.ContainerWait(cctx, "x", ""); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func frame(kind byte, s string) []byte {
	b := make([]byte, 8, 8+len(s))
	b[0] = kind
	binary.BigEndian.PutUint32(b[4:], uint32(len(s)))
	return append(b, s...)
}

// runServer answers POST /servin/run and echoes standard input.
func runServer(t *testing.T, started, exited string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		var req api.RunRequest
		if r.URL.Path != "/servin/run" || r.Header.Get("Upgrade") != "tcp" {
			t.Errorf("%s %v", r.URL, r.Header)
		}
		if err := json.NewDecoder(r.Body).Decode(&req); err != nil || req.Config.Image != "img" {
			t.Error(req, err)
		}
		k, rw, err := w.(http.Hijacker).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer k.Close()
		fmt.Fprint(rw, "HTTP/1.1 101 UPGRADED\r\nContent-Type: application/vnd.docker.multiplexed-stream\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n")
		rw.Write(frame(3, started))
		rw.Flush()
		in, _ := io.ReadAll(rw)
		rw.Write(frame(1, "out:"+string(in)))
		rw.Write(frame(2, "err"))
		if exited != "" {
			rw.Write(frame(3, exited))
		}
		rw.Flush()
	}
}

func TestRun(t *testing.T) {
	c, _ := engine(t, runServer(t, `{"ID":"abc","Warnings":["w"]}`, `{"ExitCode":7}`))
	r, err := c.Run(ctx(t), &api.RunRequest{Config: &container.Config{Image: "img"}})
	if err != nil || r.Started.ID != "abc" || len(r.Started.Warnings) != 1 {
		t.Fatalf("%+v, %v", r, err)
	}
	defer r.Close()
	io.WriteString(r, "hello")
	r.CloseWrite()
	var out, errb bytes.Buffer
	end, err := r.Copy(&out, &errb)
	if err != nil || end == nil || end.ExitCode != 7 || out.String() != "out:hello" || errb.String() != "err" {
		t.Errorf("%v %v %q %q", end, err, out.String(), errb.String())
	}
}

func TestRunRefused(t *testing.T) {
	c, _ := engine(t, runServer(t, `{"Error":"no such image: img","Status":404,"ExitCode":125}`, ""))
	_, err := c.Run(ctx(t), &api.RunRequest{Config: &container.Config{Image: "img"}})
	var e *client.Error
	if !errors.As(err, &e) || e.Status != 404 || e.ExitCode != 125 {
		t.Errorf("%#v", err)
	}
}

func TestRunWithoutEnd(t *testing.T) {
	c, _ := engine(t, runServer(t, `{"ID":"abc"}`, ""))
	r, err := c.Run(ctx(t), &api.RunRequest{Config: &container.Config{Image: "img"}})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	r.CloseWrite()
	if end, err := r.Copy(io.Discard, nil); end != nil || err != nil {
		t.Errorf("%v %v", end, err)
	}
}

func TestLogs(t *testing.T) {
	raw := false
	c, _ := engine(t, func(w http.ResponseWriter, r *http.Request) {
		if raw {
			w.Header().Set("Content-Type", "application/vnd.docker.raw-stream")
			io.WriteString(w, "raw")
			return
		}
		w.Header().Set("Content-Type", "application/vnd.docker.multiplexed-stream")
		w.Write(frame(1, "a"))
		w.Write(frame(2, "b"))
		w.Write(frame(1, "c"))
	})
	var out, errb bytes.Buffer
	if err := c.ContainerLogs(ctx(t), "x", client.LogOptions{Stdout: true, Stderr: true}, &out, &errb); err != nil || out.String() != "ac" || errb.String() != "b" {
		t.Errorf("%v %q %q", err, out.String(), errb.String())
	}
	raw = true
	out.Reset()
	if err := c.ContainerLogs(ctx(t), "x", client.LogOptions{Stdout: true}, &out, &errb); err != nil || out.String() != "raw" {
		t.Errorf("%v %q", err, out.String())
	}
}

func TestDemuxBad(t *testing.T) {
	for name, in := range map[string][]byte{
		"cut header":   frame(1, "abc")[:5],
		"cut data":     frame(1, "abc")[:9],
		"unknown type": frame(9, "abc"),
		"huge control": {3, 0, 0, 0, 0xff, 0xff, 0xff, 0xff},
		"engine error": frame(3, "boom"),
	} {
		if err := client.Demux(io.Discard, io.Discard, bytes.NewReader(in)); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	var we *client.WriteError
	if err := client.Demux(failing{}, nil, bytes.NewReader(frame(1, "abc"))); !errors.As(err, &we) {
		t.Error(err)
	}
}

type failing struct{}

func (failing) Write([]byte) (int, error) { return 0, io.ErrShortWrite }

func FuzzDemux(f *testing.F) {
	f.Add(append(frame(1, "abc"), frame(2, "x")...))
	f.Fuzz(func(t *testing.T, b []byte) { client.Demux(io.Discard, io.Discard, bytes.NewReader(b)) })
}

func TestPullProgress(t *testing.T) {
	fail := ""
	c, _ := engine(t, func(w http.ResponseWriter, r *http.Request) {
		q := r.URL.Query()
		if q.Get("fromImage") != "reg.example:5000/a/b" || q.Get("tag") != "v1" {
			t.Error(q)
		}
		if r.Header.Get(registry.AuthHeader) == "" {
			t.Error("no credentials")
		}
		io.WriteString(w, `{"status":"Pulling fs layer","id":"l1"}`+"\n"+`{"status":"Downloading","id":"l1","progressDetail":{"current":1,"total":2}}`+"\n"+fail)
	})
	n := 0
	o := client.PullOptions{Auth: &registry.AuthConfig{Username: "u", Password: "p"}}
	if err := c.ImagePull(ctx(t), "reg.example:5000/a/b:v1", o, func(client.Progress) error { n++; return nil }); err != nil || n != 2 {
		t.Errorf("%d %v", n, err)
	}
	fail = `{"errorDetail":{"code":404,"message":"manifest unknown"},"error":"manifest unknown"}`
	if err := c.ImagePull(ctx(t), "reg.example:5000/a/b:v1", o, nil); !client.IsNotFound(err) {
		t.Error(err)
	}
}

func TestUpload(t *testing.T) {
	body := bytes.Repeat([]byte("0123456789"), 50_000)
	c, _ := engine(t, func(w http.ResponseWriter, r *http.Request) {
		got, err := io.ReadAll(r.Body)
		if err != nil || !bytes.Equal(got, body) {
			t.Errorf("%d bytes, %v", len(got), err)
		}
		io.WriteString(w, `{"stream":"Loaded image: x\n"}`)
	})
	if err := c.ImageLoad(ctx(t), bytes.NewReader(body), false, nil, nil); err != nil {
		t.Error(err)
	}
}

// A body that fails halfway must not be taken for the whole.
func TestUploadFails(t *testing.T) {
	whole := make(chan bool, 1)
	c, _ := engine(t, func(w http.ResponseWriter, r *http.Request) {
		_, err := io.ReadAll(r.Body)
		whole <- err == nil
	})
	boom := errors.New("boom")
	err := c.ContainerPutArchive(ctx(t), "x", "/", io.MultiReader(strings.NewReader("abc"), errReader{boom}), client.PutArchiveOptions{})
	if !errors.Is(err, boom) {
		t.Error(err)
	}
	if <-whole {
		t.Error("the engine saw a whole body")
	}
}

// An engine that refuses before it read the body is heard.
func TestUploadRefused(t *testing.T) {
	c, _ := engine(t, func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(403)
		io.WriteString(w, `{"message":"read-only"}`)
	})
	err := c.ContainerPutArchive(ctx(t), "x", "/", bytes.NewReader(make([]byte, 1<<20)), client.PutArchiveOptions{})
	if client.Status(err) != 403 {
		t.Error(err)
	}
}

type errReader struct{ err error }

func (e errReader) Read([]byte) (int, error) { return 0, e.err }

func TestArchive(t *testing.T) {
	c, _ := engine(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-Docker-Container-Path-Stat", "eyJuYW1lIjoiZiIsInNpemUiOjN9")
		if r.Method == "GET" {
			io.WriteString(w, "tar")
		}
	})
	st, err := c.ContainerStatPath(ctx(t), "x", "/f")
	if err != nil || st.Name != "f" || st.Size != 3 {
		t.Errorf("%+v %v", st, err)
	}
	r, st, err := c.ContainerGetArchive(ctx(t), "x", "/f")
	if err != nil || st.Name != "f" {
		t.Fatal(err)
	}
	defer r.Close()
	if b, _ := io.ReadAll(r); string(b) != "tar" {
		t.Errorf("%q", b)
	}
}

func TestTLS(t *testing.T) {
	srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "OK") }))
	defer srv.Close()
	ca := filepath.Join(t.TempDir(), "ca.pem")
	os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw}), 0o600)
	host := "tcp://" + srv.Listener.Addr().String()
	for name, x := range map[string]struct {
		tls *client.TLS
		ok  bool
	}{
		"authority":  {&client.TLS{CA: ca}, true},
		"no check":   {&client.TLS{SkipVerify: true}, true},
		"wrong name": {&client.TLS{CA: ca, ServerName: "other.example"}, false},
		"unknown":    {&client.TLS{}, false},
		"no file":    {&client.TLS{CA: ca + "x"}, false},
		"plain":      {nil, false},
	} {
		c, err := client.New(client.Config{Host: host, TLS: x.tls})
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Ping(ctx(t)); (err == nil) != x.ok {
			t.Errorf("%s: %v", name, err)
		}
		c.Close()
	}
	if _, err := client.New(client.Config{Host: "unix:///x", TLS: &client.TLS{}}); err == nil {
		t.Error("TLS over a unix socket: no error")
	}
}

func TestParseHost(t *testing.T) {
	for in, want := range map[string]string{
		"unix:///a/b":       "unix /a/b",
		"unix://":           "unix " + api.DefaultSocket,
		"unix:///C:/x/s":    "unix C:/x/s",
		"/a/b":              "unix /a/b",
		"tcp://h:1":         "tcp h:1",
		"tcp://h":           "tcp h:2375",
		"https://h":         "tcp h:2376",
		"tcp://:1":          "tcp 127.0.0.1:1",
		"tcp://[::1]:1/":    "tcp [::1]:1",
		"tcp://[::1]":       "tcp [::1]:2375",
		"ssh://u@h:22":      "ssh u@h:22",
		"ssh://h":           "ssh h",
		"ssh://u:p@h":       "",
		"ssh://-oProxy=x":   "",
		"ssh://-l@h":        "",
		"ssh://":            "",
		"tcp://h:1/path":    "",
		"tcp://u@h:1":       "",
		"h:1":               "",
		"ftp://h":           "",
		"":                  "",
		"npipe:////./pipe/": "",
	} {
		n, a, err := client.ParseHost(in)
		got := n + " " + a
		if err != nil {
			got = ""
		}
		if got != want {
			t.Errorf("%q: %q (%v), want %q", in, got, err, want)
		}
	}
}

func TestSplitTag(t *testing.T) {
	for in, want := range map[string][2]string{"a": {"a", ""}, "a:b": {"a", "b"}, "h:5000/a": {"h:5000/a", ""}, "h:5000/a:b": {"h:5000/a", "b"}, "a@sha256:x": {"a", "sha256:x"}, "a:b@sha256:x": {"a:b", "sha256:x"}} {
		if n, tag := client.SplitTag(in); n != want[0] || tag != want[1] {
			t.Errorf("%q: %q %q", in, n, tag)
		}
	}
}

// The request on the wire, byte by byte: what reads it may be hostile to
// sloppiness.
func TestWire(t *testing.T) {
	sock := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	got := make(chan string, 1)
	go func() {
		k, err := l.Accept()
		if err != nil {
			return
		}
		defer k.Close()
		br := bufio.NewReader(k)
		var b strings.Builder
		for {
			line, err := br.ReadString('\n')
			b.WriteString(line)
			if err != nil || line == "\r\n" {
				break
			}
		}
		got <- b.String()
		io.WriteString(k, "HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n")
	}()
	c, _ := client.New(client.Config{Host: "unix://" + sock})
	if err := c.ContainerKill(ctx(t), "a/../b?c d", "TERM"); err != nil {
		t.Fatal(err)
	}
	want := "POST /v" + client.APIVersion + "/containers/a%2F..%2Fb%3Fc%20d/kill?signal=TERM HTTP/1.1\r\nHost: servin\r\nUser-Agent: servin-client\r\nContent-Length: 0\r\n\r\n"
	if g := <-got; g != want {
		t.Errorf("got  %q\nwant %q", g, want)
	}
}
