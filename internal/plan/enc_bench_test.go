package plan

import "testing"

func BenchmarkCompile(b *testing.B) {
	spec := defaultSpec(b, "/rootfs", "true")
	o := Options{ID: "x", V1Controllers: []string{"memory", "cpu,cpuacct"}, Seccomp: make([]byte, 8*400)}
	for b.Loop() {
		p, err := Compile(spec, o)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := p.Encode(); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkDecode(b *testing.B) {
	p, err := Compile(defaultSpec(b, "/rootfs", "true"), Options{ID: "x"})
	if err != nil {
		b.Fatal(err)
	}
	raw, err := p.Encode()
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if _, err := Decode(raw); err != nil {
			b.Fatal(err)
		}
	}
}
