package runtime

// Details are what Stats leaves out because few ask for it.
type Details struct {
	// Pressure by resource, "cpu", "memory" and "io"; cgroup v2 alone has it.
	Pressure map[string]Pressure
	// Hugepages by page size, such as "2MB".
	Hugepages map[string]HugepageUse
}

// Pressure tells how long tasks have waited for a resource: some of them, or all
// at the same time.
type Pressure struct{ Some, Full Stall }

// Stall is a kind of waiting: nanoseconds in all, and percentages of the time over
// the last 10, 60 and 300 seconds.
type Stall struct {
	Total                uint64
	Avg10, Avg60, Avg300 float64
}

// HugepageUse is in bytes.
type HugepageUse struct{ Now, Max uint64 }
