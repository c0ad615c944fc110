DROP TABLE worker_look;
DROP TABLE absent_task;
DROP TABLE worker_task;
DROP TABLE worker;
