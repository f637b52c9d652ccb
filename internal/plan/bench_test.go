package plan

import (
	"testing"

	"github.com/cloudos-io/cloudos/internal/seccomp"
)

// BenchmarkStart measures from the plan's arrival to exec, the child's
// namespaces being there already, with Docker's default profile.
func BenchmarkStart(b *testing.B) {
	for _, parked := range []bool{false, true} {
		name := map[bool]string{false: "cold", true: "parked"}[parked]
		b.Run(name, func(b *testing.B) {
			root := rootfs(b)
			spec := defaultSpec(b, root, "true")
			prof, err := seccomp.Default(spec.Process.Capabilities.Bounding)
			if err != nil {
				b.Fatal(err)
			}
			f, err := seccomp.Compile(prof)
			if err != nil {
				b.Fatal(err)
			}
			o := Options{ID: "bench", Seccomp: f.Filter, SeccompFlags: f.Flags, Parked: parked}
			p, err := Compile(spec, o)
			if err != nil {
				b.Fatal(err)
			}
			park, err := Park(true, o)
			if err != nil {
				b.Fatal(err)
			}
			b.StopTimer()
			for range b.N {
				s := startStage(b, p)
				if parked {
					if _, err := s.run(park, 0); err != nil {
						b.Fatal(err)
					}
				}
				raw, err := p.Encode()
				if err != nil {
					b.Fatal(err)
				}
				fds := s.slots(p, 0)
				b.StartTimer()
				started, err := s.send(raw, fds)
				b.StopTimer()
				if err != nil || !started {
					b.Fatal(err)
				}
				s.wait()
				s.close()
			}
		})
	}
}
