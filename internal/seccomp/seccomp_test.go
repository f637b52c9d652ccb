package seccomp

import (
	"compress/gzip"
	"encoding/binary"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cloudos-io/cloudos/internal/fault"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// call is struct seccomp_data.
type call struct {
	nr, arch uint32
	args     [6]uint64
}

// interpret runs a filter and tells its verdict and how many steps it took.
func interpret(t *testing.T, prog []byte, c call) (ret uint32, steps int) {
	t.Helper()
	var data [64]byte
	le := binary.LittleEndian
	le.PutUint32(data[0:], c.nr)
	le.PutUint32(data[4:], c.arch)
	for i, a := range c.args {
		le.PutUint64(data[16+8*i:], a)
	}
	var acc uint32
	for pc := 0; ; pc++ {
		steps++
		if pc < 0 || pc*8+8 > len(prog) {
			t.Fatalf("runs out of the program at %d", pc)
		}
		i := prog[pc*8:]
		code, jt, jf, k := le.Uint16(i), int(i[2]), int(i[3]), le.Uint32(i[4:])
		jump := func(cond bool) {
			if cond {
				pc += jt
			} else {
				pc += jf
			}
		}
		switch code {
		case 0x20:
			if k > 60 || k%4 != 0 {
				t.Fatalf("load from %d", k)
			}
			acc = le.Uint32(data[k:])
		case 0x54:
			acc &= k
		case 0x05:
			pc += int(k)
		case 0x15:
			jump(acc == k)
		case 0x25:
			jump(acc > k)
		case 0x35:
			jump(acc >= k)
		case 0x45:
			jump(acc&k != 0)
		case 0x06:
			return k, steps
		default:
			t.Fatalf("instruction %#x at %d is not known to the interpreter", code, pc)
		}
	}
}

// reference reads a filter that runc 1.5.2 made with libseccomp 2.5.4.
func reference(t *testing.T, path string) []byte {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// asOf254 hides the calls that libseccomp 2.5.4 does not know.
func asOf254() *table {
	t := &table{numbers: map[string][columns]int32{}}
	for n, row := range syscallTable().numbers {
		if row[3] > 456 || n == "uretprobe" || n == "uprobe" || n == "riscv_hwprobe" {
			continue
		}
		t.numbers[n] = row
	}
	return t
}

// probes are the argument vectors that can tell the profile's rules apart.
func probes(cfg *specs.LinuxSeccomp) [][6]uint64 {
	values := []uint64{0, 1, 2, 3, 0xffffffff, 1 << 32, ^uint64(0)}
	for _, c := range cfg.Syscalls {
		for _, a := range c.Args {
			for _, v := range []uint64{a.Value, a.ValueTwo} {
				values = append(values, v, v+1, v-1, v|1<<32, v^1<<33, ^v)
			}
		}
	}
	for i := range uint64(25) {
		values = append(values, i)
	}
	var out [][6]uint64
	for i, v := range values {
		w := values[(i*7+3)%len(values)]
		out = append(out, [6]uint64{v, v, v, v, v, v}, [6]uint64{v, w, v, w, v, w}, [6]uint64{w, v, w, w, v, v})
	}
	return out
}

func numbers() []uint32 {
	var out []uint32
	for n := range uint32(620) {
		out = append(out, n, n|x32Bit)
	}
	for n := uint32(0xf0000); n < 0xf0010; n++ { // arm's own calls
		out = append(out, n)
	}
	return append(out, 0x3fffffff, 0x7fffffff, 0x80000000, 0x80000001, 0xfffffffe, 0xffffffff)
}

// conditionalNumbers are those of calls whose arguments matter, on any
// architecture.
func conditionalNumbers(cfg *specs.LinuxSeccomp) map[uint32]bool {
	out := map[uint32]bool{102: true, 117: true}
	for _, c := range cfg.Syscalls {
		for _, n := range c.Names {
			for _, nr := range syscallTable().numbers[n] {
				if len(c.Args) > 0 && nr >= 0 {
					out[uint32(nr)], out[uint32(nr)|x32Bit] = true, true
				}
			}
		}
	}
	return out
}

var audits = map[string]uint32{"x86_64": 0xc000003e, "i386": 0x40000003, "aarch64": 0xc00000b7, "nonsense": 0x12345678}

func TestVerdictsAgainstRunc(t *testing.T) {
	files, err := filepath.Glob("testdata/*.json")
	if err != nil || len(files) < 5 {
		t.Fatalf("%d profiles: %v", len(files), err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".json"), func(t *testing.T) {
			raw, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			var cfg specs.LinuxSeccomp
			if err := json.Unmarshal(raw, &cfg); err != nil {
				t.Fatal(err)
			}
			p, err := compile(&cfg, "amd64", asOf254())
			if err != nil {
				t.Fatal(err)
			}
			ref := reference(t, strings.TrimSuffix(file, ".json")+".bpf.gz")
			conditional := conditionalNumbers(&cfg)
			bad, most, mostRef := 0, 0, 0
			for name, audit := range audits {
				for _, nr := range numbers() {
					args := probes(&cfg)
					if !conditional[nr] {
						args = args[:4] // enough to notice a condition where none belongs
					}
					for _, args := range args {
						c := call{nr, audit, args}
						got, n := interpret(t, p.Filter, c)
						want, m := interpret(t, ref, c)
						most, mostRef = max(most, n), max(mostRef, m)
						if got != want {
							if bad++; bad < 20 {
								t.Errorf("%s call %d (%#x) args %x: %#x, runc's filter says %#x", name, nr, nr, args[:3], got, want)
							}
						}
					}
				}
			}
			if bad > 0 {
				t.Fatalf("%d verdicts differ", bad)
			}
			t.Logf("%d instructions (runc %d), at most %d steps (runc %d)", len(p.Filter)/8, len(ref)/8, most, mostRef)
		})
	}
}

// TestNewerCalls: what the library above does not know is in our table.
func TestNewerCalls(t *testing.T) {
	cfg, err := Default(nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, goarch := range []string{"amd64", "arm64", "riscv64"} {
		if goarch != "amd64" {
			cfg.Architectures = nil
		}
		p, err := compile(cfg, goarch, syscallTable())
		if err != nil {
			t.Fatal(err)
		}
		audit := families()[goarch][0].audit
		for name, want := range map[string]uint32{"mseal": retAllow, "cachestat": retAllow, "fchmodat2": retAllow, "read": retAllow,
			"mount": retErrno | 1, "clone3": retErrno | 38} {
			nr, ok := syscallTable().number(name, families()[goarch][0])
			if !ok {
				t.Fatalf("%s: no number of %s", goarch, name)
			}
			if got, _ := interpret(t, p.Filter, call{nr: nr, arch: audit}); got != want {
				t.Errorf("%s: %s (%d) gives %#x, want %#x", goarch, name, nr, got, want)
			}
		}
		if got, _ := interpret(t, p.Filter, call{nr: 999, arch: audit}); got != retErrno|38 {
			t.Errorf("%s: an unknown call gives %#x, want ENOSYS", goarch, got)
		}
	}
}

func TestInvalidProfiles(t *testing.T) {
	base := func() *specs.LinuxSeccomp {
		return &specs.LinuxSeccomp{DefaultAction: specs.ActErrno, Syscalls: []specs.LinuxSyscall{{Names: []string{"read"}, Action: specs.ActAllow}}}
	}
	for name, change := range map[string]func(*specs.LinuxSeccomp){
		"default action": func(c *specs.LinuxSeccomp) { c.DefaultAction = "SCMP_ACT_DANCE" },
		"action":         func(c *specs.LinuxSeccomp) { c.Syscalls[0].Action = "" },
		"architecture":   func(c *specs.LinuxSeccomp) { c.Architectures = []specs.Arch{"SCMP_ARCH_Z80"} },
		"flag":           func(c *specs.LinuxSeccomp) { c.Flags = []specs.LinuxSeccompFlag{"X"} },
		"name":           func(c *specs.LinuxSeccomp) { c.Syscalls[0].Names = []string{""} },
		"argument": func(c *specs.LinuxSeccomp) {
			c.Syscalls[0].Args = []specs.LinuxSeccompArg{{Index: 6, Op: specs.OpEqualTo}}
		},
		"operator": func(c *specs.LinuxSeccomp) { c.Syscalls[0].Args = []specs.LinuxSeccompArg{{Op: "SCMP_CMP_MAYBE"}} },
		"length": func(c *specs.LinuxSeccomp) {
			for i := range 2000 {
				c.Syscalls = append(c.Syscalls, specs.LinuxSyscall{Names: []string{"ioctl"}, Action: specs.ActAllow,
					Args: []specs.LinuxSeccompArg{{Index: 1, Value: uint64(i), Op: specs.OpEqualTo}}})
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			c := base()
			change(c)
			if _, err := Compile(c); !fault.Is(err, fault.Invalid) {
				t.Fatalf("got %v", err)
			}
		})
	}
	if p, err := Compile(nil); p != nil || err != nil {
		t.Fatal("no profile should give no program")
	}
	if _, err := compile(base(), "s390x", syscallTable()); !fault.Is(err, fault.Unsupported) {
		t.Fatalf("got %v", err)
	}
}

func TestKey(t *testing.T) {
	seen := map[Key]string{}
	for name, change := range map[string]func(*specs.LinuxSeccomp){
		"default":   func(c *specs.LinuxSeccomp) {},
		"no flags":  func(c *specs.LinuxSeccomp) { c.Flags = []specs.LinuxSeccompFlag{} },
		"action":    func(c *specs.LinuxSeccomp) { c.DefaultAction = specs.ActKill },
		"errno":     func(c *specs.LinuxSeccomp) { c.DefaultErrnoRet = nil },
		"names":     func(c *specs.LinuxSeccomp) { c.Syscalls[0].Names = c.Syscalls[0].Names[1:] },
		"boundary":  func(c *specs.LinuxSeccomp) { c.Syscalls[0].Names[0] += c.Syscalls[0].Names[1] },
		"arguments": func(c *specs.LinuxSeccomp) { c.Syscalls[2].Args[0].Value++ },
		"archs":     func(c *specs.LinuxSeccomp) { c.Architectures = c.Architectures[:1] },
	} {
		cfg, err := Default(nil)
		if err != nil {
			t.Fatal(err)
		}
		change(cfg)
		k := KeyOf(cfg)
		if other, ok := seen[k]; ok {
			t.Errorf("%q and %q have one key", name, other)
		}
		seen[k] = name
	}
	a, _ := Default([]string{"CAP_SYS_ADMIN"})
	b, _ := Default([]string{"CAP_SYS_ADMIN"})
	if KeyOf(a) != KeyOf(b) {
		t.Error("the same profile has two keys")
	}
}

func BenchmarkKey(b *testing.B) {
	cfg, err := Default(nil)
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		KeyOf(cfg)
	}
}

func BenchmarkCompile(b *testing.B) {
	cfg, err := Default(nil)
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		Compile(cfg)
	}
}

func FuzzProfile(f *testing.F) {
	f.Add([]byte(`{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{"names":["read"],"action":"SCMP_ACT_ALLOW"}]}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		var cfg specs.LinuxSeccomp
		if json.Unmarshal(raw, &cfg) != nil {
			return
		}
		p, err := Compile(&cfg)
		if err != nil || p == nil {
			return
		}
		for _, nr := range []uint32{0, 1, 500, 0x40000001, 0xffffffff} {
			interpret(t, p.Filter, call{nr: nr, arch: 0xc000003e})
		}
	})
}
