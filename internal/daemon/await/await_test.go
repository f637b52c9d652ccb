package await

import (
	"bufio"
	"bytes"
	"encoding/json"
	"io"
	"os"
	"os/exec"
	"reflect"
	"strings"
	"testing"
)

// TestMain is the program that waits, where a test starts it so.
func TestMain(m *testing.M) {
	if os.Getenv("AWAIT_TEST") == "" {
		os.Exit(m.Run())
	}
	args, ready, run, err := Wait(os.Args[1:])
	if err != nil {
		os.Stderr.WriteString(err.Error())
		os.Exit(1)
	}
	json.NewEncoder(os.Stdout).Encode(map[string]any{"args": args, "run": run, "added": os.Getenv("ADDED"), "left": os.Getenv(name)})
	if ready != nil {
		<-ready
		os.Stdout.WriteString("ready")
	}
	os.Exit(0)
}

func TestWait(t *testing.T) {
	for _, x := range []struct {
		what, order string
		wait        bool
		want        map[string]any
		bad         string
	}{
		{"without an order to come", "", false, map[string]any{"args": []any{"own"}, "run": true, "added": "", "left": ""}, ""},
		{"an order", `{"args":["--listen","x"],"env":["ADDED=a=b"]}`, true, map[string]any{"args": []any{"--listen", "x"}, "run": true, "added": "a=b", "left": ""}, ""},
		{"dismissed", "", true, map[string]any{"args": nil, "run": false, "added": "", "left": ""}, ""},
		{"half an order", `{"args":["--lis`, true, nil, "cannot read how to run"},
		{"a variable without a name", `{"env":["=x"]}`, true, nil, "invalid argument"},
	} {
		t.Run(x.what, func(t *testing.T) {
			r, w, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			cmd := exec.Command(os.Args[0], "own")
			cmd.Env = append(os.Environ(), "AWAIT_TEST=1")
			var said strings.Builder
			cmd.Stderr = &said
			if x.wait {
				cmd.Env, cmd.ExtraFiles = append(cmd.Env, Env), []*os.File{r}
			}
			if _, err := w.WriteString(x.order); err != nil {
				t.Fatal(err)
			}
			w.Close()
			out, err := cmd.Output()
			if x.bad != "" {
				if err == nil || !strings.Contains(said.String(), x.bad) {
					t.Fatalf("%v, %q, not %q", err, said.String(), x.bad)
				}
				return
			}
			if err != nil {
				t.Fatalf("%v: %s", err, said.String())
			}
			out = bytes.TrimSuffix(out, []byte("ready"))
			var got map[string]any
			if err := json.Unmarshal(out, &got); err != nil || !reflect.DeepEqual(got, x.want) {
				t.Fatalf("%v, not %v (%v)", got, x.want, err)
			}
		})
	}
}

// TestReady holds the pipe behind an order: the program runs, but is not told that it
// may make networks.
func TestReady(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	cmd := exec.Command(os.Args[0])
	cmd.Env, cmd.ExtraFiles = append(os.Environ(), "AWAIT_TEST=1", Env), []*os.File{r}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := w.WriteString(`{"args":["x"]}` + "\n"); err != nil {
		t.Fatal(err)
	}
	b := bufio.NewReader(out)
	if l, err := b.ReadString('\n'); err != nil || !strings.Contains(l, `["x"]`) {
		t.Fatalf("it does not run: %q %v", l, err)
	}
	if b.Buffered() > 0 {
		t.Fatal("it is ready before it is told so")
	}
	w.Close()
	rest, err := io.ReadAll(b)
	if err != nil || string(rest) != "ready" {
		t.Fatalf("%q %v", rest, err)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
}
