package plan

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// TestStageParser feeds mutated plans to the stage's own parser, built for this
// host with the address and undefined-behaviour sanitizers.
func TestStageParser(t *testing.T) {
	gcc, err := exec.LookPath("gcc")
	if err != nil {
		t.Skip("SKIP: gcc is not installed")
	}
	dir := t.TempDir()
	src, err := filepath.Glob("../../shim/stage*.c")
	if err != nil {
		t.Fatal(err)
	}
	bin := filepath.Join(dir, "fuzz")
	args := append([]string{"-std=c11", "-D_GNU_SOURCE=", "-DSTAGE_HOSTED", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-unused-function",
		"-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-o", bin, "../../shim/testdata/stage_fuzz.c"}, src...)
	if out, err := exec.Command(gcc, args...).CombinedOutput(); err != nil {
		if strings.Contains(string(out), "cannot find -lasan") || strings.Contains(string(out), "cannot find libasan") {
			t.Skip("SKIP: the sanitizers' libraries are not installed")
		}
		t.Fatalf("%v: %s", err, out)
	}
	run := []string{"400", time.Now().Format("150405")}
	filter := make([]byte, 800)
	for i, f := range []func() (*Plan, error){
		func() (*Plan, error) { return Compile(defaultSpec(t, "/r", "sh"), Options{ID: "x", Seccomp: filter}) },
		func() (*Plan, error) {
			return Compile(everything(t), Options{V1Controllers: []string{"cpu,cpuacct"}, AppArmor: true, SELinux: true, Seccomp: filter, SeccompNotify: true, PreserveFDs: 3, Init: true})
		},
		func() (*Plan, error) { return Park(true, Options{V1Controllers: []string{"memory"}}) },
		func() (*Plan, error) {
			return Exec(everything(t).Process, Options{AppArmor: true, SELinux: true, UserNS: true})
		},
		func() (*Plan, error) {
			return Hooks([]specs.Hook{{Path: "/h", Args: []string{"a"}, Env: []string{"A=b"}, Timeout: ptr(3)}}, []byte("{}"))
		},
	} {
		p, err := f()
		if err != nil {
			t.Fatal(err)
		}
		if before, last := p.SplitExec(); i == 0 {
			before.Ops = append(before.Ops, Op{Kind: OpLookup, Name: "l", Payload: new(enc).strs([]string{"/bin/true"}).b},
				Op{Kind: OpMkdir, Name: "m", Payload: new(enc).str("/a/b").u32(0o755).u32(1).u32(2).b},
				Op{Kind: OpDevice, Name: "d", Payload: new(enc).str("/dev/x").u16(1).u32(8630).u32(1).u32(3).b})
			p.Ops = append(before.Ops, last.Ops...)
		}
		raw, err := p.Encode()
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, "plan"+string(rune('0'+i)))
		if err := os.WriteFile(path, raw, 0o600); err != nil {
			t.Fatal(err)
		}
		run = append(run, path)
	}
	cmd := exec.Command(bin, run...)
	cmd.Env = append(os.Environ(), "ASAN_OPTIONS=detect_leaks=0")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("seed %s: %v\n%s", run[1], err, out)
	}
	if strings.Contains(string(out), " 0 carried out") {
		t.Fatalf("no plan was carried out, so little was tried: %s", out)
	}
	t.Logf("seed %s: %s", run[1], out)
}
