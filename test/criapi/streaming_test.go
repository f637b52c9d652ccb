package criapi

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	v1 "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"

	"github.com/cloudos-io/cloudos/test/harness"
)

// dial takes a streaming URL, as the kubelet's clients do.
func dial(t *testing.T, url, protocol string) (httpstream.Connection, error) {
	t.Helper()
	rt, err := spdy.NewRoundTripper(nil)
	if err != nil {
		t.Fatal(err)
	}
	req, err := http.NewRequest(http.MethodPost, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Add(httpstream.HeaderProtocolVersion, protocol)
	resp, err := (&http.Client{Transport: rt}).Do(req)
	if err != nil {
		return nil, err
	}
	return rt.NewConnection(resp)
}

// command is a client of exec or attach.
type command struct {
	t           *testing.T
	conn        httpstream.Connection
	stdin       httpstream.Stream
	resize      httpstream.Stream
	out, errOut chan string
	status      chan string
}

func connect(t *testing.T, url string, stdin, stderr, tty bool) *command {
	t.Helper()
	conn, err := dial(t, url, "v4.channel.k8s.io")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	c := &command{t: t, conn: conn, out: make(chan string, 1), errOut: make(chan string, 1), status: make(chan string, 1)}
	stream := func(kind string) httpstream.Stream {
		s, err := conn.CreateStream(http.Header{"streamType": {kind}})
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	read := func(kind string, to chan string) {
		s := stream(kind)
		go func() { b, _ := io.ReadAll(s); to <- string(b) }()
	}
	read("error", c.status)
	if stdin {
		c.stdin = stream("stdin")
	}
	read("stdout", c.out)
	if stderr {
		read("stderr", c.errOut)
	}
	if tty {
		c.resize = stream("resize")
	}
	return c
}

func wait(t *testing.T, what string, ch chan string) string {
	t.Helper()
	select {
	case s := <-ch:
		return s
	case <-time.After(20 * time.Second):
		t.Fatalf("%s does not end", what)
		return ""
	}
}

func streams(t *testing.T, n *node) {
	p := podConfig(t)
	pod := n.run(t, p)
	id := n.create(t, pod, p, sleeper("a"))
	n.startContainer(t, id)
	execURL := func(req *v1.ExecRequest) string {
		req.ContainerId = id
		r, err := n.rt.Exec(ctx(t), req)
		if err != nil {
			t.Fatal(err)
		}
		return r.Url
	}
	url := execURL(&v1.ExecRequest{Cmd: []string{"sh", "-c", "echo hello; echo bad >&2; exit 7"}, Stdout: true, Stderr: true})
	c := connect(t, url, false, true, false)
	if out, errOut := wait(t, "stdout", c.out), wait(t, "stderr", c.errOut); out != "hello\n" || errOut != "bad\n" {
		t.Errorf("%q, %q", out, errOut)
	}
	var st struct {
		Status, Reason string
		Details        struct{ Causes []struct{ Message string } }
	}
	if s := wait(t, "status", c.status); json.Unmarshal([]byte(s), &st) != nil || st.Status != "Failure" || st.Reason != "NonZeroExitCode" || st.Details.Causes[0].Message != "7" {
		t.Errorf("status %q", s)
	}
	if _, err := dial(t, url, "v4.channel.k8s.io"); err == nil {
		t.Error("a token was taken twice")
	}
	if _, err := dial(t, url[:len(url)-3]+"xyz", "v4.channel.k8s.io"); err == nil {
		t.Error("a made-up token was taken")
	}

	big := strings.Repeat("0123456789abcdef", 1<<14)
	c = connect(t, execURL(&v1.ExecRequest{Cmd: []string{"cat"}, Stdin: true, Stdout: true}), true, false, false)
	go func() { _, _ = io.Copy(c.stdin, strings.NewReader(big)); c.stdin.Close() }()
	if out := wait(t, "cat", c.out); out != big {
		t.Errorf("%d bytes of %d came back", len(out), len(big))
	}

	c = connect(t, execURL(&v1.ExecRequest{Cmd: []string{"sh"}, Stdin: true, Stdout: true, Tty: true}), true, false, true)
	fmt.Fprint(c.resize, `{"Width":101,"Height":31}`)
	time.Sleep(100 * time.Millisecond)
	fmt.Fprint(c.stdin, "stty size; exit\n")
	if out := wait(t, "the terminal", c.out); !strings.Contains(out, "31 101\r\n") {
		t.Errorf("%q", out)
	}

	// Attach: the shell's input ends with the client's (stdin once).
	sh := sleeper("shell")
	sh.Command, sh.Stdin, sh.StdinOnce = []string{"/bin/sh"}, true, true
	shell := n.create(t, pod, p, sh)
	n.startContainer(t, shell)
	r, err := n.rt.Attach(ctx(t), &v1.AttachRequest{ContainerId: shell, Stdin: true, Stdout: true, Stderr: true})
	if err != nil {
		t.Fatal(err)
	}
	c = connect(t, r.Url, true, true, false)
	fmt.Fprint(c.stdin, "echo hello; echo err >&2\n")
	time.Sleep(100 * time.Millisecond)
	c.stdin.Close()
	if out, errOut := wait(t, "attach", c.out), wait(t, "stderr", c.errOut); out != "hello\n" || errOut != "err\n" {
		t.Errorf("%q, %q", out, errOut)
	}
	if s := n.exit(t, shell); s.ExitCode != 0 {
		t.Errorf("%v", s)
	}

	for name, err := range map[string]error{
		"nothing wanted": func() error {
			_, err := n.rt.Exec(ctx(t), &v1.ExecRequest{ContainerId: id, Cmd: []string{"x"}})
			return err
		}(),
		"no command": func() error { _, err := n.rt.Exec(ctx(t), &v1.ExecRequest{ContainerId: id, Stdout: true}); return err }(),
		"tty and stderr": func() error {
			_, err := n.rt.Exec(ctx(t), &v1.ExecRequest{ContainerId: id, Cmd: []string{"x"}, Tty: true, Stdout: true, Stderr: true})
			return err
		}(),
		"attach to no io": func() error { _, err := n.rt.Attach(ctx(t), &v1.AttachRequest{ContainerId: id}); return err }(),
	} {
		wants(t, name, err, codes.InvalidArgument)
	}
	_, err = n.rt.Attach(ctx(t), &v1.AttachRequest{ContainerId: shell, Stdout: true})
	wants(t, "attach to one that ended", err, codes.FailedPrecondition)
}

func portForward(t *testing.T, n *node) {
	for _, host := range []bool{false, true} {
		p := podConfig(t)
		port := 8080
		if host {
			port = 18081
			p.Linux.SecurityContext = &v1.LinuxSandboxSecurityContext{NamespaceOptions: &v1.NamespaceOption{Network: v1.NamespaceMode_NODE, Pid: v1.NamespaceMode_CONTAINER}}
		}
		c := sleeper("web")
		c.Command = []string{"sh", "-c", "echo it works >/tmp/index.html; exec httpd -f -p 127.0.0.1:" + strconv.Itoa(port) + " -h /tmp"}
		pod, id := n.up(t, p, c)
		harness.Eventually(t, "the server", 5*time.Second, func() bool {
			return n.try(t, id, "wget", "-q", "-O", "-", "http://127.0.0.1:"+strconv.Itoa(port)+"/").ExitCode == 0
		})
		r, err := n.rt.PortForward(ctx(t), &v1.PortForwardRequest{PodSandboxId: pod, Port: []int32{int32(port)}})
		if err != nil {
			t.Fatal(err)
		}
		conn, err := dial(t, r.Url, "portforward.k8s.io")
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		request := 0
		get := func(port int) (body, problem string) {
			request++
			h := http.Header{"port": {strconv.Itoa(port)}, "requestID": {strconv.Itoa(request)}}
			h.Set("streamType", "error")
			errs, err := conn.CreateStream(h.Clone())
			if err != nil {
				t.Fatal(err)
			}
			errs.Close() // nothing is said there, only heard
			h.Set("streamType", "data")
			data, err := conn.CreateStream(h)
			if err != nil {
				t.Fatal(err)
			}
			fmt.Fprint(data, "GET / HTTP/1.0\r\n\r\n")
			got := make(chan string, 2)
			go func() { b, _ := io.ReadAll(data); got <- string(b) }()
			body = wait(t, "the answer", got)
			go func() { b, _ := io.ReadAll(errs); got <- string(b) }()
			return body, wait(t, "the error", got)
		}
		for range 3 {
			if body, problem := get(port); !strings.HasSuffix(body, "it works\n") || problem != "" {
				t.Errorf("host network %v: %q, %q", host, body, problem)
			}
		}
		if body, problem := get(port + 1); body != "" || !strings.Contains(problem, "cannot connect") {
			t.Errorf("closed port: %q, %q", body, problem)
		}
		if _, err := n.rt.StopPodSandbox(ctx(t), &v1.StopPodSandboxRequest{PodSandboxId: pod}); err != nil {
			t.Fatal(err)
		}
		_, err = n.rt.PortForward(ctx(t), &v1.PortForwardRequest{PodSandboxId: pod})
		wants(t, "forward to a stopped pod", err, codes.FailedPrecondition)
	}
}
