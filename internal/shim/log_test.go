package shim

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

// buildLogFeed compiles the log's source for this host with the address and
// undefined behaviour sanitizers.
func buildLogFeed(t testing.TB) string {
	cc, err := exec.LookPath("gcc")
	if err != nil {
		t.Skip("SKIP: there is no gcc")
	}
	bin := filepath.Join(t.TempDir(), "logfeed")
	out, err := exec.Command(cc, "-std=c11", "-g", "-O1", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
		"-o", bin, "testdata/logfeed.c", "../../shim/log.c").CombinedOutput()
	if err != nil {
		if bytes.Contains(out, []byte("asan")) && bytes.Contains(out, []byte("cannot find")) {
			t.Skipf("SKIP: gcc has no sanitizers: %s", out)
		}
		t.Fatalf("%v\n%s", err, out)
	}
	return bin
}

type chunk struct {
	stream byte
	data   []byte
}

func feed(t testing.TB, bin string, format LogFormat, path string, max, files string, chunks []chunk) {
	t.Helper()
	var in bytes.Buffer
	for _, c := range chunks {
		in.WriteByte(c.stream)
		_ = binary.Write(&in, binary.LittleEndian, uint32(len(c.data)))
		in.Write(c.data)
	}
	cmd := exec.Command(bin, string('0'+rune(format)), path, max, files)
	cmd.Stdin = &in
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}

// want is what Docker's copier makes of a stream: lines, cut at 16 KiB.
func want(data []byte) (out []string) {
	for len(data) > 0 {
		i := bytes.IndexByte(data, '\n')
		switch {
		case i >= 0 && i < 16384:
			out = append(out, string(data[:i+1]))
			data = data[i+1:]
		case len(data) < 16384:
			return append(out, string(data))
		default:
			out = append(out, string(data[:16384]))
			data = data[16384:]
		}
	}
	return out
}

func asJSON(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); {
		r, n := utf8.DecodeRuneInString(s[i:])
		b.WriteRune(r)
		i += n
	}
	return b.String()
}

func TestLogSource(t *testing.T) {
	bin := buildLogFeed(t)
	rng := rand.New(rand.NewPCG(1, 2))
	alphabets := []string{"abc\n", "\n", "x", "\x00\x01\x1f\"\\<>&\n\r\t", "é€😀\u2028\u2029\n", string([]byte{0xff, 0xc0, 0xed, 0xa0, 0x80, 0xf4, 0x90, 0xe2, 0x80, '\n'})}
	for round := range 40 {
		var chunks []chunk
		all := map[byte][]byte{}
		for range 1 + rng.IntN(20) {
			c := chunk{stream: byte(1 + rng.IntN(2))}
			a := []rune(alphabets[rng.IntN(len(alphabets))])
			raw := []byte(alphabets[len(alphabets)-1])
			for n := rng.IntN(40000); len(c.data) < n; {
				if rng.IntN(100) == 0 {
					c.data = append(c.data, raw[rng.IntN(len(raw))])
				}
				c.data = append(c.data, string(a[rng.IntN(len(a))])...)
			}
			chunks = append(chunks, c)
			all[c.stream] = append(all[c.stream], c.data...)
		}
		path := filepath.Join(t.TempDir(), "log")
		feed(t, bin, LogJSON, path, "0", "1", chunks)
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		got := map[string][]string{}
		var last time.Time
		for line := range bytes.Lines(b) {
			var r struct {
				Log, Stream string
				Time        time.Time
			}
			if err := json.Unmarshal(line, &r); err != nil {
				t.Fatalf("round %d: %v in %.200q", round, err, line)
			}
			if r.Time.Before(last) || time.Since(r.Time) > time.Minute {
				t.Fatalf("time %v", r.Time)
			}
			last = r.Time
			got[r.Stream] = append(got[r.Stream], r.Log)
		}
		for stream, name := range map[byte]string{1: "stdout", 2: "stderr"} {
			w := want(all[stream])
			if len(w) != len(got[name]) {
				t.Fatalf("round %d: %d records of %s, want %d", round, len(got[name]), name, len(w))
			}
			for i := range w {
				if got[name][i] != asJSON(w[i]) {
					t.Fatalf("round %d: record %d of %s is %.60q, want %.60q", round, i, name, got[name][i], asJSON(w[i]))
				}
			}
		}
	}
}

// TestLogTorn: half a record that a crash left is ended before the next.
func TestLogTorn(t *testing.T) {
	bin := buildLogFeed(t)
	path := filepath.Join(t.TempDir(), "log")
	if err := os.WriteFile(path, []byte(`{"log":"ha`), 0o640); err != nil {
		t.Fatal(err)
	}
	feed(t, bin, LogJSON, path, "0", "1", []chunk{{1, []byte("x\n")}})
	b, _ := os.ReadFile(path)
	lines := strings.Split(string(b), "\n")
	if len(lines) != 3 || !json.Valid([]byte(lines[1])) {
		t.Errorf("%q", lines)
	}
	// A link in the log's place is not followed.
	link := path + ".link"
	if err := os.Symlink("/dev/null", link); err != nil {
		t.Fatal(err)
	}
	if err := exec.Command(bin, "1", link, "0", "1").Run(); err == nil {
		t.Error("a link was followed")
	}
}

// TestLogTime compares the calendar with Go's through the k8s format.
func TestLogTime(t *testing.T) {
	bin := buildLogFeed(t)
	path := filepath.Join(t.TempDir(), "log")
	feed(t, bin, LogK8s, path, "0", "1", []chunk{{2, []byte("x\n")}})
	b, _ := os.ReadFile(path)
	stamp, rest, _ := strings.Cut(string(b), " ")
	at, err := time.Parse("2006-01-02T15:04:05.000000000Z", stamp)
	if err != nil || time.Since(at).Abs() > time.Minute || rest != "stderr F x\n" {
		t.Errorf("%q %v", b, err)
	}
}
